"""Whether a run that is killed and resumed is the run that was never stopped, bit for bit. For any recipe, yours too.

    python -m distill.verify_resume recipes/match_embeddings.py --data texts.jsonl
    python -m distill.verify_resume --processes 2 --steps 30 --kills 2 mine.py --flags of the recipe

The recipe runs in processes of its own: once undisturbed, and once killed (SIGKILL) behind a checkpoint and resumed, as
often as --kills says. Both end with the last checkpoint, before anything is evaluated. Then every logged number, the order
of the texts, weights, optimizer and random states are compared. Exit code 0: equal; 4: not, the first difference is named.
"""
