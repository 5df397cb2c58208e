"""The command line: `lightly-mim`, and `python -m lightly_mim`.

Which commands there are, their options and the version are told without PyTorch and
Lightning, whose import takes seconds. What the parser says of a command is kept in
`help/`, which `make help` writes anew and a test compares with the parser.
"""

import sys
from pathlib import Path

from lightly_mim import __version__
from lightly_mim.interrupts import end_at_once, raise_again

HELP = """\
usage: lightly-mim COMMAND [options]

Masked image modelling: pretrain an encoder on images without labels, and see what it
is worth.

  pretrain        pretrain an encoder on a folder of images
  evaluate        probe, fine-tune or compare an encoder on labelled images
  evaluate-dense  the same for images whose pixels have classes
  report          write one HTML page of a run, or of several beside each other
  show            print the results of an evaluation again
  predict         tell the classes of images by what an evaluation has trained
  embed           write the features of images, with the names of their files
  convert         take weights to timm, transformers, lightly, ONNX, torch.export

lightly-mim COMMAND --help      all options of a command
lightly-mim --completion bash   a completion script for a shell: bash, zsh or tcsh
lightly-mim --version

Begin with: lightly-mim pretrain --data photos/ --out runs/first --minutes 30
"""


def _commands() -> dict[str, Path]:
    """Returns the files of help by the names of their commands."""
    files = (Path(__file__).parent / "help").glob("*.txt")
    return {file.stem: file for file in files}


def main() -> None:
    """Runs the command line."""
    words = sys.argv[1:]
    if words in ([], ["-h"], ["--help"]):
        print(HELP, end="")
    elif len(words) == 2 and words[1] in ("-h", "--help") and words[0] in _commands():
        print(_commands()[words[0]].read_text(), end="")
    elif words == ["--version"]:
        print(f"lightly-mim {__version__}")
    else:
        end_at_once()
        from lightly_mim import cli

        raise_again()
        try:
            cli.main(words)
        finally:
            end_at_once()


if __name__ == "__main__":
    main()
