"""The network of an exported folder with all that drawing takes, as a component of a diffusers pipeline.  export.py copies this file."""

import importlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path


def import_package(folder: Path):
    """The code beside this model, under a name that holds its hash: other versions of it may be there too."""
    (code,) = folder.glob("jit_t2i_*/")
    if code.name not in sys.modules:
        spec = importlib.util.spec_from_file_location(code.name, code / "__init__.py", submodule_search_locations=[str(code)])
        sys.modules[code.name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return importlib.import_module(f"{code.name}.sampling")


class JiTPainter:
    """Loaded at the first use, on the device of then."""

    def __init__(self, folder: Path):
        """folder: with the code, and the model in model/."""
        self.folder, self.sampling, self.device, self.loaded = folder, import_package(folder), "auto", {}

    @classmethod
    def from_pretrained(cls, path: str, **options) -> "JiTPainter":
        return cls(Path(path))

    @property
    def painter(self):
        if self.device not in self.loaded:
            self.loaded = {self.device: self.sampling.load_painter(self.folder / "model", device=self.device)}
        return self.loaded[self.device]

    def __call__(self, prompts, seed: int = 0, **changes):
        """PIL pictures.  changes: of the sampler, those that are not None."""
        asked = {name: value for name, value in changes.items() if value is not None}
        return [self.sampling.to_image(picture) for picture in self.painter(prompts, replace(self.painter.sampler, **asked), seed)]
