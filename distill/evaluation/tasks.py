"""What people judged: retrieval, the likeness of two sentences, classes."""

import hashlib
import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from distill import metrics
from distill.data import Labelled, Pairs, Retrieval
from distill.evaluation.scores import Score, mean_score, rank_score
from distill.heads import CosineLinear
from distill.similarity import pairwise_cosine, top_k_neighbours


def retrieval(
    queries: Float[Tensor, "q d"], documents: Float[Tensor, "n d"], data: Retrieval, *, k: int = 10
) -> dict[str, Score]:
    """nDCG@k and recall@k of ranking documents by cosine, over the judged queries."""
    place = {name: number for number, name in enumerate(data.corpus_ids)}
    with_relevant = [number for number, has_relevant in enumerate(judged(data)) if has_relevant]
    _, ranked = top_k_neighbours(queries[with_relevant], documents, min(k, len(documents)))
    grades = [data.qrels[data.query_ids[number]] for number in with_relevant]
    qrels = [{place[name]: float(grade) for name, grade in found.items()} for found in grades]
    return {
        f"ndcg@{k}": mean_score(metrics.ndcg_at_k(ranked, qrels, k).values),
        f"recall@{k}": mean_score(metrics.recall_at_k(ranked, qrels, k).values),
    }


def mixed_index(ids: Sequence[str], old: Float[Tensor, "n d"], new: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """An index half-way: documents embedded by the teacher (`old`) stay, and those that came since are the student's (`new`).

    Which document is new is a hash of its id, so it is the same half for every student, in every run.
    """
    return torch.where(_is_new(ids).unsqueeze(1), new, old)


def _is_new(ids: Sequence[str]) -> Bool[Tensor, " n"]:
    digests = (hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=1).digest() for name in ids)
    return torch.tensor([digest[0] % 2 == 1 for digest in digests], dtype=torch.bool)


def similarity_pairs(first: Float[Tensor, "n d"], second: Float[Tensor, "n d"], data: Pairs) -> Score:
    """Spearman correlation of cosines with people's scores (STS)."""
    return rank_score(pairwise_cosine(first, second), torch.tensor(data.score, dtype=torch.float64))


def centroid_accuracy(train: Float[Tensor, "n d"], test: Float[Tensor, "m d"], data: Labelled) -> Score:
    """Accuracy on the test texts of a CosineLinear whose proxies are the mean directions of the classes: no training.

    A class that has no direction, as none of its texts is there, is given to no text.
    """
    if data.test is None:
        raise ValueError("centroid_accuracy needs labelled test texts.")
    head = CosineLinear(train.shape[1], len(data.names), sigma=False)
    nn.init.zeros_(head.weight)
    head.imprint(train, torch.tensor(data.labels))
    logits = head(test)["logits"].detach().masked_fill(~head.weight.any(dim=1), -math.inf)
    return mean_score((logits.argmax(dim=1) == torch.tensor(data.test.labels)).float())


def judged(data: Retrieval) -> list[bool]:
    """Whether a query has anything relevant to find."""
    return [any(grade > 0 for grade in data.qrels.get(query, {}).values()) for query in data.query_ids]
