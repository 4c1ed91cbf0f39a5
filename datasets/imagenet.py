"""Class folders, as ImageNet has them: data_path/train/<class>/*.JPEG, classes numbered in the order of their names."""

from pathlib import Path

from datasets.stream import PictureDataset, View
from util.errors import UserError


class ClassFolder(PictureDataset):
    """Raises: UserError for a folder that is not there or empty, or for more class folders than `class_num`, if that is given."""

    def __init__(self, root: str | Path, class_num: int | None, view: View, seed: int = 0):
        from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset  # it brings networks along: seconds, in each process

        folder = Path(root) / "train"
        if not folder.is_dir():
            hint = "; it has images/, so a -Text model is meant?" if (Path(root) / "images").is_dir() else ""
            raise UserError(f"--data_path {root}: no folder train/ with one folder a class in it{hint}")
        try:
            classes, numbers = find_classes(folder)
            samples = make_dataset(folder, numbers, extensions=IMG_EXTENSIONS, allow_empty=False)
        except FileNotFoundError as error:
            raise UserError(f"--data_path {root}: {error}") from error
        if class_num is not None and len(classes) > class_num:
            raise UserError(f"--data_path {root}: {len(classes)} class folders, but --class_num is {class_num}")
        paths, labels = zip(*samples)
        super().__init__(paths, view, seed)
        self.labels, self.classes = labels, classes

    def condition(self, index: int, n: int) -> int:
        return self.labels[index]
