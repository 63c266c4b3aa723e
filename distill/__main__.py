"""python -m distill: the commands there are."""

import sys

COMMANDS = {
    "embed": "import vectors that you already have into a store",
    "store": "look into a store, verify, repair, compress or export it",
    "narrow": "turn an index into a student's narrower space",
    "teachers": "join the stores of several teachers into one",
    "export": "ONNX files, shorter vectors, or a repository on the Hub, from a student's folder",
    "report": "write a run's page anew, or compare several runs on one page",
    "scaling": "what a corpus of any size takes on any number of GPUs",
    "verify_resume": "run a recipe twice, kill and resume it once, and compare the two",
}


def main() -> None:
    """List the commands; exit code 2 if one of them was meant."""
    if meant := [name for name in sys.argv[1:2] if name in COMMANDS]:
        print(f"error: the command is python -m distill.{meant[0]}, with a dot.", file=sys.stderr)
        sys.exit(2)
    print("Commands, each with --help. Students are trained by the recipes: accelerate launch recipes/NAME.py --help\n")
    for name, purpose in COMMANDS.items():
        print(f"  python -m distill.{name:<15} {purpose}")


if __name__ == "__main__":
    main()
