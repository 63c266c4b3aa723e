"""Texts, sentence pairs, retrieval sets and labelled texts from files, data sets and Python lists.

A row that cannot be used is named as `tables` names it. Rows without text are left out and counted.
"""

from distill.data.labelled import Labelled, load_labelled
from distill.data.pairs import Pairs, load_pairs
from distill.data.retrieval import Retrieval, load_retrieval
from distill.data.texts import LoadedTexts, SourceReport, TextReport, load_texts

__all__ = [
    "Labelled",
    "LoadedTexts",
    "Pairs",
    "Retrieval",
    "SourceReport",
    "TextReport",
    "load_labelled",
    "load_pairs",
    "load_retrieval",
    "load_texts",
]
