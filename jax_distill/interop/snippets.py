"""The program of a model card: it draws with exported weights, and needs torch and diffusers alone.

Pieces of Python text; `$names` stand for values of the card.
"""

HEAD = """
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, $scheduler
from diffusers.image_processor import VaeImageProcessor
from safetensors.torch import load_file

FOLDER = Path(".")  # of this file
ROWS, COLUMNS, CHANNELS = $rows, $columns, $channels  # tokens of a picture, $patch pixels wide
TIME_SCALE = $time_scale  # the network embeds TIME_SCALE t; diffusers' multiplies by 1000
"""

FROM_PRETRAINED = """
transformer = FluxTransformer2DModel.from_pretrained(FOLDER / "transformer")
"""

IMPORT_EMBEDDING = "from diffusers.models.embeddings import TimestepEmbedding\n"

STATE = {
    "diffusers": """
files = sorted((FOLDER / "transformer").glob("*.safetensors"))
state = {name: x for file in files for name, x in load_file(file).items()}
""",
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
scheduler = $scheduler.from_pretrained(FOLDER / "scheduler")
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

DRAW_TEACHER = """
@torch.no_grad()
def draw(noise, sequence, pooled, steps=$steps, guidance=$guidance):
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], mu=$mu)
    x = noise
    for t, timestep in zip(scheduler.sigmas, scheduler.timesteps):
        v = velocity(x, t, sequence, pooled, guidance)
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
    return decode(x)
"""

DRAW_SCM = """
@torch.no_grad()
def draw(noise, sequence, pooled, steps=$steps, guidance=$guidance, generator=None):
    middle = $middle if steps == 2 else None
    scheduler.set_timesteps(steps, max_timesteps=torch.pi / 2, intermediate_timesteps=middle)
    scale = scheduler.config.sigma_data
    y = scale * noise
    for angle in scheduler.timesteps[:-1]:
        # TrigFlow's point and output from those of the linear path.
        cos, sin = angle.cos(), angle.sin()
        t, x = (sin / (sin + cos)).clamp(max=1), y / scale / (sin + cos)
        v = velocity(x, t, sequence, pooled, guidance)
        output = ((1 - 2 * t) * x + (1 - 2 * t + 2 * t**2) * v) * (sin + cos)
        output = scale * output
        y, data = scheduler.step(output, angle, y, generator=generator, return_dict=False)
    return decode(data / scale)
"""

_PUSH = """
@torch.no_grad()
def draw(noise, sequence, pooled, steps=$steps, guidance=$guidance):
    {set_timesteps}
    x = noise
    for t, s, timestep in zip(scheduler.sigmas, scheduler.sigmas[1:], scheduler.timesteps):
        transformer.time_text_embed.interval = float(t - s)
        v = velocity(x, t, sequence, pooled, guidance)
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
    return decode(x)
"""
DRAW_MEANFLOW = _PUSH.format(set_timesteps="scheduler.set_timesteps(steps)")
_IMM_TIMES = """# From $time_max on: at 1 it was not trained.
    uniform = [1 - i / steps for i in range(steps)]
    times = [$time_max * $shift / ($shift + 1 / t - 1) for t in uniform]
    scheduler.set_timesteps(sigmas=times)"""
DRAW_IMM = _PUSH.format(set_timesteps=_IMM_TIMES)

DRAW_IMM_RESTART = f"""
@torch.no_grad()
def draw(noise, sequence, pooled, steps=$steps, guidance=$guidance, generator=None):
    {_IMM_TIMES}
    x = noise
    for t, s, timestep in zip(scheduler.sigmas, scheduler.sigmas[1:], scheduler.timesteps):
        transformer.time_text_embed.interval = float(t)  # to data, and back to s
        v = velocity(x, t, sequence, pooled, guidance)
        data = scheduler.step(v, timestep, x, r_timestep=0.0, return_dict=False)[0]
        fresh = torch.randn(x.shape, generator=generator)
        x = scheduler.scale_noise(data, 1000 * s.reshape(1), fresh)
    return decode(data)
"""

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
    sequence, pooled, _ = pipe.encode_prompt(prompt, None, max_sequence_length=$text_length)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, ROWS * COLUMNS, CHANNELS, generator=generator)
    draw(noise.to(sequence.dtype), sequence, pooled)[0].save("0.png")
"""

PIPELINE_ADAPTERS = """
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors.torch import load_file

pipe = FluxPipeline.from_pretrained("$teacher")
pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
pipe.transformer.load_state_dict(load_file("embedders.safetensors"), strict=False)
pipe.load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors")  # needs peft
pictures = pipe(
    "a red circle above a blue square",
    max_sequence_length=$text_length,
    sigmas=$sigmas,
    num_inference_steps=$steps,
    guidance_scale=$guidance,
    height=$height,
    width=$width,
    generator=torch.Generator().manual_seed(0),
).images
"""

_PIPELINE = """
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
{more}
scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
pipe = FluxPipeline.from_pretrained(".", {parts}scheduler=scheduler)
pictures = pipe(
    {prompt},
    sigmas=$sigmas,
    num_inference_steps=$steps,
    guidance_scale=$guidance,
    height=$height,
    width=$width,
    generator=torch.Generator().manual_seed(0),
).images
"""

PIPELINE_EXAMPLES = _PIPELINE.format(
    more="""from safetensors.torch import load_file

parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
examples = load_file("examples.safetensors")""",
    parts="**dict.fromkeys(parts), ",
    prompt="""prompt_embeds=examples["sequence"],
    pooled_prompt_embeds=examples["pooled"]""",
)

PIPELINE_PROMPT = _PIPELINE.format(
    more="",
    parts="",
    prompt="""\"a red circle above a blue square\",
    max_sequence_length=$text_length""",
)
