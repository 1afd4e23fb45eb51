"""Writes Noto's pictures for the captions of a folder of pictures: they measure how far a LoRA drifts from the base.

python scripts/noto_held_out.py EMOJI_PACKAGE_DIR src/lorasmith/demo/pictures/line_drawing/held_out \\
    src/lorasmith/demo/pictures/noto/held_out
"""

import argparse
from pathlib import Path

import noto


def emojis_of(captions: Path, package: Path) -> list[noto.Emoji]:
    """The emoji of each NAME.txt in `captions`, sorted by name; name and caption must both be the package's."""
    by_name = {emoji.short_name: emoji for emoji in noto.emojis(package)}
    found = []
    for path in sorted(captions.glob("*.txt")):
        if path.stem not in by_name:
            raise ValueError(f"a caption file must be named for an emoji's short name, got {path}")
        emoji = by_name[path.stem]
        caption = path.read_text(encoding="utf-8").strip()
        if caption != emoji.caption:
            raise ValueError(f"the caption must be {emoji.caption!r}, got {caption!r}: {path}")
        found.append(emoji)
    return found


def write_pair(emoji: noto.Emoji, folder: Path) -> None:
    noto.picture(emoji).save(folder / f"{emoji.short_name}.png", optimize=True)
    (folder / f"{emoji.short_name}.txt").write_text(emoji.caption + "\n", encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes Noto's pictures for the captions of a folder of pictures.")
    parser.add_argument("package", type=Path, help="npm's emoji-datasource-google 16, unpacked")
    parser.add_argument("captions", type=Path, help="a folder with a NAME.txt for each picture wanted")
    parser.add_argument("out", type=Path, help="the folder to write NAME.png and NAME.txt to")
    args = parser.parse_args()
    found = emojis_of(args.captions, args.package)
    args.out.mkdir(parents=True, exist_ok=True)
    for emoji in found:
        write_pair(emoji, args.out)
    print(f"{len(found)} pictures in {args.out}")


if __name__ == "__main__":
    main()
