"""sCM and MeanFlow on networks of T2I-Distill against its formulas, written out in PyTorch.

The state dicts come through `port`. PyTorch computes in float64, but for what diffusers itself
does in float32, with `torch.func.jvp`; ours is float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_files
import random_flux
import torch
from diffusers.models.embeddings import TimestepEmbedding
from random_files import NETWORK
from torch.nn.attention import SDPBackend, sdpa_kernel

from jax_distill import config
from jax_distill.assembly import build
from jax_distill.flow import Batch, Text
from jax_distill.interop import ported_folder
from jax_distill.models import mmdit
from jax_distill.objectives import teacher
from jax_distill.objectives.meanflow import MeanFlow, MeanFlowDraws
from jax_distill.objectives.objective import View
from jax_distill.objectives.scm import SCM, SCMDraws
from jax_distill.runs.porting import port

GRID = (3, 4)
LIMITS = {"loss": 1e-6, "tangent": 1e-6, "error": 1e-6, "d image_out": 3e-6, "d image_in": 3e-6}


EMBEDDERS = {
    "t": "time_text_embed.timestep_embedder",
    "w": "time_text_embed.guidance_embedder",
    "t - s": "timestep_embedder2",
}


def _embedder(state, prefix):
    """diffusers' sinusoids, of exact angles, and its two layers."""
    layers = TimestepEmbedding(256, NETWORK.hidden_size).double()
    found = {k.removeprefix(prefix): x.double() for k, x in state.items() if k.startswith(prefix)}
    layers.load_state_dict(found)
    frequencies = torch.exp(-np.log(10000.0) * torch.arange(128, dtype=torch.float64) / 128)

    def embed(values):
        angles = values[:, None] * frequencies
        return layers(torch.cat([torch.cos(angles), torch.sin(angles)], dim=1))

    return embed


class Theirs:
    """T2I-Distill's network: diffusers' blocks, modulated by embeddings of t, w and t - s."""

    def __init__(self, state):
        self.model = random_flux.reference(NETWORK).double()
        inner = {k: x for k, x in state.items() if not k.startswith("timestep_embedder2.")}
        self.model.load_state_dict(inner)
        self.model.requires_grad_(True)
        self.embedders = {
            name: _embedder(state, f"{path}.")
            for name, path in EMBEDDERS.items()
            if f"{path}.linear_1.bias" in state
        }

    def temb(self, t, text, w, interval=None):
        """The summed embedding: of t, of w and of pooled text, each as it is."""
        total = self.model.time_text_embed.text_embedder(text[1])
        total = total + self.embedders["t"](t) + self.embedders["w"](w)
        return total if interval is None else total + self.embedders["t - s"](interval)

    def __call__(self, x, t, text, w, interval=None):
        embedding = self.temb(t, text, w, interval)
        self.model.time_text_embed.forward = lambda *_: embedding
        ids = torch.zeros(*GRID, 3, dtype=torch.float64)
        ids[..., 1], ids[..., 2] = torch.meshgrid(*map(torch.arange, GRID), indexing="ij")
        return self.model(
            hidden_states=x,
            encoder_hidden_states=text[0],
            pooled_projections=text[1],
            timestep=t,
            guidance=w,
            img_ids=ids.reshape(-1, 3),
            txt_ids=torch.zeros(5, 3, dtype=torch.float64),
        ).sample


def _column(values):
    return values[:, None, None]


def _derivative(function, point, direction):
    with sdpa_kernel(SDPBackend.MATH):  # which alone has a forward derivative
        return torch.func.jvp(function, point, direction)[1]


def scm_loss(student, guide, inputs, head, step):
    """arXiv:2512.13006's sCM: learned weight, warm-up, normalised tangent."""
    x, noise, text, w = inputs["x"], inputs["noise"], inputs["text"], inputs["w"]
    a, s_d = inputs["a"], 0.5
    cos, sin = _column(a.cos()), _column(a.sin())

    def trig(network, z, a):
        t = a.sin() / (a.sin() + a.cos())
        rho = _column((t**2 + (1 - t) ** 2).sqrt())
        x_t, t_ = z * rho, _column(t)
        return ((1 - 2 * t_) * x_t + (1 - 2 * t_ + 2 * t_**2) * network(x_t, t, text, w)) / rho

    y = cos * (s_d * x) + sin * (s_d * noise)
    with torch.no_grad():
        dy = s_d * trig(guide, y / s_d, a)
        direction = (cos * sin * dy / s_d, a.cos() * a.sin())
        d_f = _derivative(lambda z, a: trig(student, z, a), (y / s_d, a), direction)
    f = trig(student, y / s_d, a)
    r = min(1.0, step / 4000)
    g = -(cos**2) * (s_d * f.detach() - dy) - r * (cos * sin * y + s_d * d_f)
    norm = g.flatten(1).norm(dim=1)
    g = g / (_column(norm) + 0.1)
    logvar = student.temb(a, text, w) @ head["kernel"] + head["bias"]
    weight = 1 / (s_d * a.tan())
    square = (f - f.detach() - g) ** 2
    loss = (_column(weight / logvar[:, 0].exp()) * square + _column(logvar[:, 0])).mean()
    return loss, norm.mean()


def meanflow_loss(student, guide, inputs, power, omega, kappa):
    """arXiv:2512.13006's MeanFlow: mixture at h = t - r, direction e - x where there is none."""
    x, noise, text, null, w = (inputs[name] for name in ("x", "noise", "text", "null", "w"))
    t, r = inputs["t"], inputs["r"]
    x_t = (1 - _column(t)) * x + _column(t) * noise
    with torch.no_grad():
        mixed = omega * guide(x_t, t, text, w)
        mixed = mixed + kappa * student(x_t, t, text, w, t - r)
        empty = tuple(n.expand_as(c) for n, c in zip(null, text))
        mixed = mixed + (1 - omega - kappa) * student(x_t, t, empty, w, t - r)
        direction = (mixed, torch.zeros_like(r), torch.ones_like(t))
        du = _derivative(lambda x, r, t: student(x, t, text, w, t - r), (x_t, r, t), direction)
    u = student(x_t, t, text, w, t - r)
    square = (u - (mixed - _column(t - r) * du)).flatten(1).pow(2).sum(1)
    return (square / (square.detach() + 1e-3) ** power).mean(), square.detach().mean()


class Ported(NamedTuple):
    network: mmdit.MMDiTConfig
    params: dict
    theirs: Theirs


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A teacher and a student by their state dicts, both sides; intervals for the student."""
    root = tmp_path_factory.mktemp("t2i_distill")
    base = random_files.save_base(root)

    def make(name, interval, seed):
        state = random_files.state_dict(interval=interval)
        generator = torch.Generator().manual_seed(seed)
        state = {  # every network its own
            key: x + 0.1 * x.std().nan_to_num(0) * torch.randn(x.shape, generator=generator)
            for key, x in state.items()
        }
        torch.save({"module": state}, root / f"{name}.pt")
        port(root / f"{name}.pt", root / name, base=str(base))
        settings = config.load(root / name)
        like = jax.eval_shape(lambda: build.initial_parameters(settings))
        params = ported_folder.load_part(root / name, "network", like)
        return Ported(build.network_config(settings), params, Theirs(state))

    return make("teacher", False, 1), make("scm", False, 2), make("meanflow", True, 3)


def draw_inputs():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "x": normal(2, 12, 16),
        "noise": normal(2, 12, 16),
        "text": (normal(2, 5, 24), normal(2, 16)),
        "null": (normal(1, 5, 24), normal(1, 16)),
        "w": np.float32([4.0, 5.0]),
        "a": np.float32([0.4, 1.1]),
        "t": np.float32([0.8, 0.45]),
        "r": np.float32([0.3, 0.4]),
    }


def in_torch(inputs):
    return jax.tree.map(lambda leaf: torch.from_numpy(np.asarray(leaf)).double(), inputs)


def compare(ours, gradient, network):
    """Values, and the gradients of the first and the last layer, relative to their sizes."""
    found = []
    for name, (mine, other) in {**ours, **gradient}.items():
        mine, other = np.asarray(mine, np.float64), other.detach().numpy()
        error = np.linalg.norm(mine - other) / np.linalg.norm(other)
        found.append(f"{name} {error:.1e}")
        assert error <= LIMITS[name], (name, error)
    print(network, ", ".join(found))


def gradients(gradient, theirs):
    model = theirs.model
    return {
        "d image_out": (gradient["image_out"]["kernel"].T, model.proj_out.weight.grad),
        "d image_in": (gradient["image_in"]["kernel"].T, model.x_embedder.weight.grad),
    }


@pytest.mark.parametrize("step", [0, 1000, 4000])
def test_scm(networks, step):
    guide, student, _ = networks
    inputs, rng = draw_inputs(), np.random.default_rng(1)
    width = NETWORK.hidden_size
    head = {"kernel": 0.1 * rng.standard_normal((width, 1)), "bias": rng.standard_normal(1)}
    head = jax.tree.map(np.float32, head)
    objective = SCM(
        mmdit.as_network(student.network, grid=GRID),
        teacher.embedded_guidance(mmdit.as_network(guide.network, grid=GRID)),
    )
    batch = Batch(inputs["x"], Text(*inputs["text"]))
    draws = SCMDraws(inputs["a"], inputs["noise"], inputs["w"])

    def loss(params):
        view = View({"teacher": guide.params})
        return objective.loss(params, view, batch, draws, jnp.int32(step))

    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        {"network": student.params, "logvar": head}
    )
    student.theirs.model.zero_grad()
    expected, norm = scm_loss(student.theirs, guide.theirs, in_torch(inputs), in_torch(head), step)
    expected.backward()
    ours = {"loss": (value, expected), "tangent": (metrics["tangent_norm"], norm)}
    made = gradients(gradient["network"], student.theirs)
    compare(ours, made, f"sCM, step {step}:")


@pytest.mark.parametrize(
    ("power", "omega", "kappa"), [(1.0, 1.0, 0.0), (0.5, 0.6, 0.3)], ids=["plain", "mixed"]
)
def test_meanflow(networks, power, omega, kappa):
    guide, _, student = networks
    inputs = draw_inputs()
    objective = MeanFlow(
        mmdit.as_network(student.network, grid=GRID),
        teacher.embedded_guidance(mmdit.as_network(guide.network, grid=GRID)),
        omega=omega,
        kappa=kappa,
        mix_interval=True,
        loss_power=power,
    )
    batch = Batch(inputs["x"], Text(*inputs["text"]))
    dropped = np.zeros(2, bool)
    draws = MeanFlowDraws(inputs["t"], inputs["r"], inputs["noise"], inputs["w"], dropped)

    def loss(params):
        view = View({"teacher": guide.params, "null": Text(*inputs["null"])})
        return objective.loss({"network": params}, view, batch, draws, jnp.int32(0))

    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(student.params)
    student.theirs.model.zero_grad()
    expected, square = meanflow_loss(
        student.theirs, guide.theirs, in_torch(inputs), power, omega, kappa
    )
    expected.backward()
    error = metrics["error"] * inputs["x"][0].size
    ours = {"loss": (value, expected), "error": (error, square)}
    made = gradients(gradient, student.theirs)
    compare(ours, made, "MeanFlow:")
