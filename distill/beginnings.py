"""Long texts cut before they are tokenized, where the first tokens are certainly the same.

A tokenizer reads a whole text and then keeps max_length of its tokens: 21 s for a line of 15 MB.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer

CHARACTERS = 16  # kept for each token; English has four or five, so that a second look is rare
# Parts of a tokenizer that change no word by what stands behind the next space. Others may: SentencePiece, bytes, NFKC.
NORMALIZERS = {"NoneType", "BertNormalizer", "Lowercase"}
PRE_TOKENIZERS = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}


def beginnings(texts: Sequence[str], max_length: int, tokenizer: Tokenizer) -> list[str]:
    """Each text, or its beginning up to a space where it is longer than 16 * max_length characters.

    If a beginning has more than max_length tokens, these are the text's own; else the whole text has to be tokenized.
    Texts stay whole for a tokenizer that does not read word by word.
    """
    limit = CHARACTERS * max_length
    if max(map(len, texts)) <= limit or not _reads_word_by_word(tokenizer):
        return list(texts)
    return [text if len(text) <= limit else text[: max(text.rfind(" ", 0, limit), 0)] or text for text in texts]


def _reads_word_by_word(tokenizer: Tokenizer) -> bool:
    parts = type(tokenizer.normalizer).__name__ in NORMALIZERS, type(tokenizer.pre_tokenizer).__name__ in PRE_TOKENIZERS
    added = (token.content for token in tokenizer.get_added_tokens_decoder().values())
    return all(parts) and not any(" " in content for content in added)
