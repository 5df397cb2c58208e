"""The command line: `lightly-mim`, and `python -m lightly_mim`.

Which commands there are, and the version, are told without PyTorch and Lightning, whose
import takes seconds.
"""

import sys

from lightly_mim import __version__

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


def main() -> None:
    """Runs the command line."""
    words = sys.argv[1:]
    if words in ([], ["-h"], ["--help"]):
        print(HELP, end="")
    elif words == ["--version"]:
        print(f"lightly-mim {__version__}")
    else:
        from lightly_mim import cli

        cli.main(words)


if __name__ == "__main__":
    main()
