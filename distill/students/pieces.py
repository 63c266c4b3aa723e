"""The three models of a tokenizer, as its JSON holds them: which pieces must stay, how words join, how it is written again.

WordPiece takes the longest piece that fits, BPE merges neighbours in the order of its list, Unigram takes the pieces of
the highest score. In all three a word whose pieces all stay keeps them: what goes was not chosen for it.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from distill.errors import RecipeError

State = dict[str, Any]  # what Tokenizer.to_str writes
KNOWN = ("WordPiece", "BPE", "Unigram")
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # of byte_fallback: what is read where no character is known
ABOVE_ITS_PARTS = 1e-6  # log-probability: a word takes the place of its own pieces, and of no others


def require_known(state: State) -> None:
    """RecipeError for a model whose words have no smaller pieces."""
    kind = state["model"]["type"]
    if kind not in KNOWN:
        raise RecipeError(
            f"a vocabulary is fitted to {', '.join(KNOWN)} tokenizers; this one is {kind}, which has nothing to read a word "
            "by that is left out. Keep the teacher's whole vocabulary (vocabulary=None)."
        )


def require_room_for_words(state: State) -> None:
    """RecipeError for a BPE that marks the end of a word: a whole word would be looked up without the mark."""
    model = state["model"]
    if model["type"] == "BPE" and (model.get("end_of_word_suffix") or model.get("continuing_subword_prefix")):
        raise RecipeError("words have no place in a BPE tokenizer with an end-of-word suffix or a prefix. Use words=0.")


def ordered(state: State) -> list[str]:
    """The pieces of the model in the order of their ids."""
    vocabulary = state["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [piece, score]
        return [piece for piece, _ in vocabulary]
    return sorted(vocabulary, key=vocabulary.__getitem__)


def unknown(state: State) -> str | None:
    """The piece for what cannot be read."""
    model = state["model"]
    if model["type"] == "Unigram":
        return None if model["unk_id"] is None else str(model["vocab"][model["unk_id"]][0])
    return None if model["unk_token"] is None else str(model["unk_token"])


def joined(state: State, parts: Sequence[str]) -> str:
    """The one piece that consecutive pieces of a word are together."""
    return parts[0] + "".join(bare(state, part) for part in parts[1:])


def bare(state: State, piece: str) -> str:
    """A piece without the prefix that says that a word goes on."""
    return piece.removeprefix(_prefix(state))


def chosen(
    state: State,
    counts: Mapping[str, int],
    size: int | None,
    *,
    spelled: Collection[str] | None = None,
    unreadable: Collection[str] = (),
) -> tuple[list[str], list[str]]:
    """The pieces to keep, in their order, and the characters that the model lacks, which stand behind them.

    First what must stay: special tokens, the unknown one, bytes, and the characters of the pieces `spelled` (None: all).
    Then the others, the most frequent first, each with the pieces that it is merged from; none of the `unreadable`.
    """
    order = ordered(state)
    known, merged_from = set(order), _merged_from(state)
    special = {token["content"] for token in state["added_tokens"] if token["special"]} | {unknown(state)}
    others = known - special - set(unreadable)
    characters = _characters(state, others)
    required = characters if spelled is None else _characters(state, others & set(spelled))
    kept = {piece for piece in order if piece in special or BYTE.fullmatch(piece)} | (required & known)
    lacking = sorted(required - known)
    behind = len(lacking) + len(_outside(state, counts))
    if size is not None and size < len(kept) + behind:
        raise RecipeError(
            f"a vocabulary of {size} tokens is too small: special tokens and single characters are {len(kept) + behind}. "
            'Give more, or characters="seen" to keep the characters of the texts only.'
        )
    rank = {piece: number for number, piece in enumerate(order)}
    for piece in sorted(others - characters - kept, key=lambda piece: (-counts.get(piece, 0), rank[piece])):
        if size is None and not counts.get(piece):
            break
        more = _parts([piece], merged_from) - kept
        if size is None or len(kept) + len(more) + behind <= size:
            kept |= more
    return [*(piece for piece in order if piece in kept), *lacking], lacking


def rebuilt(
    state: State, pieces: Sequence[str], new: Mapping[str, Sequence[str]], counts: Mapping[str, int] | None = None
) -> Tokenizer:
    """The tokenizer with these pieces, ids 0..n-1 in this order; behind them the added tokens that are no pieces.

    `new` are the pieces that the model lacks, each with those that it takes the place of, or none. With `counts`, added
    tokens that are neither special nor counted go. Nothing is put around a text: a static table has no use for it.
    """
    ids = {piece: number for number, piece in enumerate(pieces)}
    added = [token for token in state["added_tokens"] if token["content"] in ids] + _outside(state, counts)
    placed = [token | {"id": ids.setdefault(token["content"], len(ids))} for token in added]
    model = state["model"] | _rewritten(state, pieces, new)
    whole = {"model": model, "added_tokens": sorted(placed, key=lambda token: token["id"]), "post_processor": None}
    return Tokenizer.from_str(json.dumps(state | whole))


def _rewritten(state: State, pieces: Sequence[str], new: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The fields of the model that change."""
    model, ids = state["model"], {piece: number for number, piece in enumerate(pieces)}
    if model["type"] == "Unigram":
        scores = dict(model["vocab"])
        lowest = min(scores.values())
        scores |= {
            piece: sum(scores[part] for part in parts) + ABOVE_ITS_PARTS if parts else lowest
            for piece, parts in new.items()
        }
        unk = unknown(state)
        return {"vocab": [[piece, scores[piece]] for piece in pieces], "unk_id": None if unk is None else ids[unk]}
    if model["type"] == "WordPiece":
        return {"vocab": ids}
    merges = [list(pair) for pair in _merges(state) if {*pair, joined(state, pair)} <= ids.keys()]
    return {"vocab": ids, "merges": merges, "ignore_merges": bool(model.get("ignore_merges")) or any(new.values())}


def _prefix(state: State) -> str:
    return state["model"].get("continuing_subword_prefix") or ""


def _outside(state: State, counts: Mapping[str, int] | None) -> list[dict[str, Any]]:
    """The added tokens to keep that are no pieces of the model."""
    known = set(ordered(state))
    added = [token for token in state["added_tokens"] if token["content"] not in known]
    return [token for token in added if counts is None or token["special"] or counts.get(token["content"])]


def _characters(state: State, pieces: Iterable[str]) -> set[str]:
    """The pieces of one character that `pieces` are made of. With them no word made of such pieces is ever unknown."""
    if state["model"]["type"] == "BPE":
        merged_from = _merged_from(state)
        merged = {part for parts in merged_from.values() for part in parts}
        symbols = _parts(pieces, merged_from) - merged_from.keys()
        return {symbol for symbol in symbols if symbol in merged or len(symbol) == 1}
    prefix, found = _prefix(state), set()
    for piece in pieces:
        goes_on = bool(prefix) and piece.startswith(prefix)
        for place, character in enumerate(bare(state, piece)):
            found.add(prefix + character if goes_on or place else character)
    return found


def _merges(state: State) -> list[tuple[str, str]]:
    """The pairs that a BPE merges, in their order. Older files hold them as one string each."""
    merges = state["model"].get("merges", [])
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return [(first, second) for first, second in pairs]


def _merged_from(state: State) -> dict[str, set[str]]:
    """The parts of every merge that makes a piece: all, since which of them a word takes depends on the word."""
    found: dict[str, set[str]] = {}
    for pair in _merges(state):
        found.setdefault(joined(state, pair), set()).update(pair)
    return found


def _parts(pieces: Iterable[str], merged_from: Mapping[str, set[str]]) -> set[str]:
    """Pieces, what they are merged from, and so on."""
    found, waiting = set[str](), list(pieces)
    while waiting:
        piece = waiting.pop()
        if piece not in found:
            found.add(piece)
            waiting += merged_from.get(piece, ())
    return found
