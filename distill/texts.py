"""Lists of texts, perhaps by role, and what is no such list."""

from collections.abc import Mapping, Sequence

from distill.errors import DataError

Texts = Sequence[str] | Mapping[str, Sequence[str]]  # alone, or by role: {"query": [...], "document": [...]}


def distinct(texts: Sequence[str]) -> list[str]:
    """Each text once, in their order. DataError for one text where a list of them is expected."""
    refuse_one_text(texts)
    return list(dict.fromkeys(texts))


def texts_by_role(texts: Texts) -> list[tuple[str | None, Sequence[str]]]:
    """Texts with their role, in their order; texts alone have none."""
    roles: list[tuple[str | None, Sequence[str]]] = (
        list(texts.items()) if isinstance(texts, Mapping) else [(None, texts)]
    )
    for _, some in roles:
        refuse_one_text(some)
    return roles


def refuse_one_text(texts: Sequence[str]) -> None:
    """A str is a sequence of texts, too: its letters."""
    if isinstance(texts, str):
        raise DataError(f"a list of texts is expected, got one text, {texts[:60]!r}. Put it in a list.")


def refuse_what_is_no_text(texts: Sequence[str]) -> None:
    """DataError for what is no str, and for half a surrogate pair, which is no Unicode: its number and how it begins."""
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"text {number} is {type(text).__name__} {text!r:.60}; a str is expected.")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"text {number} holds half a surrogate pair at character {error.start}: {text[:60]!r}. It was cut "
                    "in the middle of a character; text.encode('utf-8', 'replace').decode() replaces such halves."
                ) from None
