"""The programs of a model card: they draw with exported weights, with torch and diffusers alone.

Pieces of Python text; `$names` stand for numbers of the card, or for other pieces. Folders of
diffusers are for its own pipelines; for single files and adapters a program makes the network and
walks the schedule.
"""

HEAD = """
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.image_processor import VaeImageProcessor
from safetensors.torch import load_file

FOLDER = Path(".")  # of this file
ROWS, COLUMNS, CHANNELS = $rows, $columns, $channels  # tokens of a picture, $patch pixels wide
TIME_SCALE = $time_scale  # the network embeds TIME_SCALE t; diffusers' multiplies by 1000
"""

IMPORT_EMBEDDING = "from diffusers.models.embeddings import TimestepEmbedding\n"

STATE = {
    "t2i_distill": """
state = torch.load(FOLDER / "model.pt", weights_only=True)["module"]
""",
    "safetensors": """
state = load_file(FOLDER / "model.safetensors")
""",
    "lora": """
base = FluxTransformer2DModel.from_pretrained("$teacher", subfolder="transformer")
state = {**base.state_dict(), **load_file(FOLDER / "embedders.safetensors")}
""",
}

ADAPTERS = """
transformer.load_lora_adapter(".", weight_name="pytorch_lora_weights.safetensors")  # needs peft
"""

FROM_STATE = """
config = FluxTransformer2DModel.load_config(FOLDER / "transformer")
transformer = FluxTransformer2DModel.from_config(config)
transformer.load_state_dict(state, assign=True)
transformer.float()  # as what follows is
"""

# The second time embedder, which diffusers' class does not have.
SECOND = """
prefix = "timestep_embedder2."
second = {x.removeprefix(prefix): state.pop(x) for x in list(state) if x.startswith(prefix)}
"""

TWO_TIMES = '''
class TwoTimes(torch.nn.Module):
    """diffusers' embedding of time, guidance and text, plus that of the interval t - s."""

    def __init__(self, first, weights):
        super().__init__()
        self.first, self.interval = first, 0.0
        self.second = TimestepEmbedding(256, len(weights["linear_1.bias"]))
        self.second.load_state_dict(weights, assign=True)
        self.second.float()

    def forward(self, *inputs):
        times = torch.full((len(inputs[0]),), self.interval * TIME_SCALE)
        features = self.first.time_proj(times.to(inputs[0].device))
        return self.first(*inputs) + self.second(features.to(inputs[-1].dtype))
'''

USE_TWO_TIMES = """
transformer.time_text_embed = TwoTimes(transformer.time_text_embed, second)
"""

REST = """
vae = AutoencoderKL.from_pretrained($vae)
scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(FOLDER / "scheduler")
axes = torch.zeros(1), torch.arange(0.0, ROWS), torch.arange(0.0, COLUMNS)
places = torch.cartesian_prod(*axes)
"""

NETWORK = '''
def network(x, t, sequence, pooled, guidance):
    """dx/dt at t in [0, 1], where 0 is data and 1 noise; x: (batch, tokens, channels)."""
    return transformer(
        hidden_states=x,
        timestep=torch.full((len(x),), float(t) * TIME_SCALE / 1000),
        guidance=$guidance_input,
        encoder_hidden_states=sequence,
        pooled_projections=pooled,
        txt_ids=torch.zeros(sequence.shape[1], 3),
        img_ids=places,
        return_dict=False,
    )[0]
'''

EMBEDS = "torch.full((len(x),), float(guidance))"
EMBEDS_SCALED = "torch.full((len(x),), float(guidance) * $guidance_share)"

DECODE = '''
def decode(x):
    """Tokens to pictures."""
    x = x.reshape(len(x), ROWS, COLUMNS, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    x = x.reshape(len(x), -1, 2 * ROWS, 2 * COLUMNS)
    x = x / vae.config.scaling_factor + vae.config.shift_factor
    return VaeImageProcessor().postprocess(vae.decode(x.to(vae.dtype), return_dict=False)[0])
'''

PLAIN = """
velocity = network
"""

GUIDED = '''
def velocity(x, t, sequence, pooled, guidance):
    """Classifier-free guidance: away from the empty caption."""
    empty, empty_pooled = examples["null_sequence"], examples["null_pooled"]
    empty = network(x, t, empty.expand_as(sequence), empty_pooled.expand_as(pooled), guidance)
    return empty + guidance * (network(x, t, sequence, pooled, guidance) - empty)
'''

DRAW = """
@torch.no_grad()
def draw(noise, sequence, pooled, steps=$steps, guidance=$guidance, generator=None):$schedule
    scheduler.set_timesteps(sigmas=sigmas, mu=$mu)
    x = noise
    for t, s, timestep in zip(scheduler.sigmas, scheduler.sigmas[1:], scheduler.timesteps):$interval
        v = velocity(x, t, sequence, pooled, guidance)
        x = scheduler.step(v, timestep, x, generator=generator, return_dict=False)[0]
    return decode(x)
"""

EVEN = """
    sigmas = [1 - i / steps for i in range(steps)]"""

ANGLES_SCHEDULE = """
    if steps > 2:  # even angles of TrigFlow; the scheduler's shift is undone
        tangents = torch.tan(torch.pi / 2 * torch.tensor(sigmas, dtype=torch.float64)).tolist()
        sigmas = [x / (x + $shift) for x in tangents]"""

LATE_SCHEDULE = """
    # From $start on, at 1 it was not trained; the scheduler's shift is undone.
    times = [$start * $shift * u / (1 + ($shift - 1) * u) for u in sigmas]
    sigmas = [t / ($shift - ($shift - 1) * t) for t in times]"""

LISTED_SCHEDULE = """
    listed = $listed  # of the most steps; the scheduler's shift is undone
    if steps > len(listed):
        raise ValueError(f"steps: {steps} is more than {len(listed)}")
    sigmas = listed[:steps]"""

INTERVAL = """
        transformer.time_text_embed.interval = float($length)"""

EXAMPLES = """
# What jax_distill's caption encoder makes of the captions above.
examples = load_file(FOLDER / "examples.safetensors")
"""

DRAW_EXAMPLES = """
if __name__ == "__main__":
    sequence, pooled = examples["sequence"], examples["pooled"]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(sequence), ROWS * COLUMNS, CHANNELS, generator=generator)
    for number, picture in enumerate(draw(noise, sequence, pooled)):
        picture.save(f"{number}.png")
"""

DRAW_PROMPT = """
if __name__ == "__main__":
    from diffusers import FluxPipeline  # its text encoders need transformers

    pipe = FluxPipeline.from_pretrained("$folder", transformer=None, vae=None)
    prompt = "a red circle above a blue square"
    sequence, pooled, _ = pipe.encode_prompt(prompt, None, max_sequence_length=$text_length)$null
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, ROWS * COLUMNS, CHANNELS, generator=generator)
    draw(noise.to(sequence.dtype), sequence, pooled)[0].save("0.png")
"""

PIPELINE = """
import torch
from diffusers import $pipelines
$head
pipe = DiffusionPipeline.from_pretrained("."$options, dtype=torch.$dtype)
pictures = pipe(
    $prompt,
    num_inference_steps=$steps,$sigmas
    guidance_scale=$guidance,
    height=$height,
    width=$width,
    generator=torch.Generator().manual_seed(0),
).images
"""

PARTS_EXAMPLES = """from safetensors.torch import load_file

parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
examples = load_file("examples.safetensors")
"""

PARTS_TEACHER = """
parts = FluxPipeline.from_pretrained("$teacher", transformer=None, scheduler=None).components
parts = {name: parts[name] for name in parts if name not in ("transformer", "scheduler")}
"""

PROMPT_EXAMPLES = """prompt_embeds=examples["sequence"],
    pooled_prompt_embeds=examples["pooled"]"""

PROMPT_GUIDED = """prompt_embeds=examples["sequence"],
    pooled_prompt_embeds=examples["pooled"],
    negative_prompt_embeds=examples["null_sequence"].expand_as(examples["sequence"]),
    negative_pooled_prompt_embeds=examples["null_pooled"].expand_as(examples["pooled"]),
    true_cfg_scale=$guidance"""

PROMPT = """"a red circle above a blue square",
    max_sequence_length=$text_length"""

PROMPT_AWAY = (
    PROMPT
    + """,
    negative_prompt=" ",
    true_cfg_scale=$guidance"""
)

NULL = """
    empty, empty_pooled, _ = pipe.encode_prompt(" ", None, max_sequence_length=$text_length)
    examples = {"null_sequence": empty, "null_pooled": empty_pooled}"""

BFLOAT16 = """
import torch
from diffusers import FluxTransformer2DModel

FluxTransformer2DModel._keep_in_fp32_modules = ["time_text_embed"]
transformer = FluxTransformer2DModel.from_pretrained("transformer", dtype=torch.bfloat16)
embed = transformer.time_text_embed
embed.register_forward_pre_hook(lambda module, inputs: (*inputs[:-1], inputs[-1].float()))
embed.register_forward_hook(lambda module, inputs, output: output.bfloat16())
"""

PIPELINE_ADAPTERS = """
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors.torch import load_file

pipe = FluxPipeline.from_pretrained("$teacher", dtype=torch.float32)
pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained("scheduler")
pipe.transformer.load_state_dict(load_file("embedders.safetensors"), strict=False)
pipe.load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors")  # needs peft
pictures = pipe(
    "a red circle above a blue square",
    max_sequence_length=$text_length,
    num_inference_steps=$steps,$sigmas
    guidance_scale=$guidance,
    height=$height,
    width=$width,
    generator=torch.Generator().manual_seed(0),
).images
"""
