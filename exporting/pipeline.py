"""`DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)`; then `pipe("夕焼けの海辺を走る柴犬").images[0]`.  export.py copies this file."""

import shutil

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput


class JiTPipeline(DiffusionPipeline):
    def __init__(self, painter):
        super().__init__()
        self.register_modules(painter=painter)

    def to(self, *places, **options) -> "JiTPipeline":
        """A device, "cuda" or "cpu"; the weights' type stays as it was exported."""
        for value in (*places, options.get("device")):
            if isinstance(value, str | torch.device):
                device = torch.device(value)
                if device.type not in ("cuda", "cpu") or device.index:
                    raise ValueError(f"{device}: it draws on the first GPU or on the CPU; choose another GPU by CUDA_VISIBLE_DEVICES")
                self.painter.device = device.type
        return self

    def save_pretrained(self, save_directory: str, **options) -> None:
        """As it was loaded."""
        shutil.copytree(self.painter.folder.parent, save_directory, dirs_exist_ok=True)

    def __call__(
        self,
        prompt: str | int | list[str] | list[int],
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        num_inference_steps: int | None = None,
        solver: str | None = None,
        seed: int = 0,
    ) -> ImagePipelineOutput:
        """Args: prompt: captions, or label numbers of a class model; the others: None draws as the model says; seed: of the noise, as --seed.

        Returns: .images, PIL, one of each prompt; picture i follows from the seed, i and its prompt.
        """
        prompts = prompt if isinstance(prompt, list) else [prompt]
        images = self.painter(prompts, seed, cfg_scale=guidance_scale, cfg_interval=guidance_interval, steps=num_inference_steps, method=solver)
        return ImagePipelineOutput(images=images)
