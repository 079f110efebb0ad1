"""Two halves of CIFAR-10: five classes to train on, and the other five to fine-tune on.

    python examples/five_classes.py                    # downloads CIFAR-10 to data/
    python examples/five_classes.py --images FOLDER    # FOLDER/{train,test}/CLASS/*, no download

makes the folders and prints the commands to type next.
"""

import argparse
from pathlib import Path

from torchvision.datasets import CIFAR10

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--images", type=Path, help="folder of images that are there already")
parser.add_argument(
    "--output", type=Path, default=Path("data/halves"), help="folder for the two halves"
)
args = parser.parse_args()

images = args.images
if images is None:
    images = Path("data/cifar10-png")
    for split in ("train", "test"):
        dataset = CIFAR10("data", train=split == "train", download=True)
        for number, (image, label) in enumerate(dataset):
            path = images / split / dataset.classes[label] / f"{number:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)

for split in ("train", "test"):
    classes = sorted(folder for folder in (images / split).iterdir() if folder.is_dir())
    for number, folder in enumerate(classes):
        half = "first" if number < len(classes) // 2 else "second"
        link = args.output / half / split / folder.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(folder.resolve())

train = "python -m cachefreeze.train --arch wrn16_2 --dataset imagefolder --image-size 32"
print(f"{train} --data-dir {args.output}/first --epochs 10 --output-dir runs/first")
print(f"{train} --data-dir {args.output}/second --epochs 10 --weights runs/first/best.pt \\")
print("    --freeze-first group2")
