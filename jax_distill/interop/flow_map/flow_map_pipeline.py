"""FLUX's pipeline for a flow map, whose network is told where each step leads."""

import torch
from diffusers import FluxPipeline


class FlowMapPipeline(FluxPipeline):
    """`FluxPipeline` with a `FlowMapTransformer2DModel`."""

    @torch.no_grad()
    def __call__(self, prompt=None, *, num_inference_steps=4, sigmas=None, **inputs):
        """As `FluxPipeline.__call__`."""
        time_max, shift = self.transformer.config.time_max, self.scheduler.config.shift
        if sigmas is None and time_max != 1:
            even = [1 - i / num_inference_steps for i in range(num_inference_steps)]
            times = [time_max * shift * u / (1 + (shift - 1) * u) for u in even]
            sigmas = [t / (shift - (shift - 1) * t) for t in times]  # the scheduler shifts them
        self.transformer.step_of = self._step_of
        return super().__call__(
            prompt, num_inference_steps=num_inference_steps, sigmas=sigmas, **inputs
        )

    def _step_of(self, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """t and t - s of a step; the timestep that the network gets is rounded to its type."""
        sigmas = self.scheduler.sigmas
        index = (sigmas[:-1] - timestep.to(sigmas)).abs().argmin()
        t, s = sigmas[index], sigmas[index + 1]
        # To data, and with fresh noise back to s; or straight to s.
        return t, t if self.scheduler.config.stochastic_sampling else t - s
