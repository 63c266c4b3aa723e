"""Cosines: both forms against the oracle, zero and extreme rows, 16-bit inputs, autocast, exact neighbours."""

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError
from oracles import unit_rows

from distill.similarity import cosine_similarity_matrix, normalize, pairwise_cosine, top_k_neighbours


def oracle(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.tensor([[float(x @ y) for y in unit_rows(b)] for x in unit_rows(a)], dtype=torch.float64)


@pytest.mark.parametrize("method", ["matmul", "broadcast"])
@pytest.mark.parametrize(("b", "n", "d"), [(1, 1, 1), (2, 5, 3), (7, 2, 16), (30, 40, 24)])
def test_both_forms_equal_the_oracle(method: str, b: int, n: int, d: int) -> None:
    student, teacher = torch.randn(b, d, dtype=torch.float64), torch.randn(n, d, dtype=torch.float64)
    cosines = cosine_similarity_matrix(student, teacher, method=method)
    assert cosines.dtype == torch.float64
    torch.testing.assert_close(cosines, oracle(student, teacher), rtol=0, atol=1e-14)


@pytest.mark.parametrize("method", ["matmul", "broadcast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_dtype_is_computed_in_float32_also_inside_autocast(method: str, dtype: torch.dtype) -> None:
    student, teacher = torch.randn(9, 64).to(dtype), torch.randn(11, 64).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cosines = cosine_similarity_matrix(student, teacher, method=method)
        naive = F.normalize(student.float()) @ F.normalize(teacher.float()).T
    assert cosines.dtype == torch.float32
    assert (cosines - oracle(student, teacher)).abs().max() < 1e-6
    assert (naive - oracle(student, teacher)).abs().max() > 1e-4  # what autocast does to it


def test_mixed_dtypes_meet_in_the_wider() -> None:
    cosines = cosine_similarity_matrix(torch.randn(2, 3), torch.randn(4, 3, dtype=torch.float64))
    assert cosines.dtype == torch.float64


@pytest.mark.parametrize("method", ["matmul", "broadcast"])
def test_zero_rows_give_zero_and_zero_gradient(method: str) -> None:
    student, teacher = torch.randn(3, 4), torch.randn(5, 4)
    student[1] = 0
    teacher[2] = 0
    student.requires_grad_()
    cosines = cosine_similarity_matrix(student, teacher, method=method)
    cosines.sum().backward()
    assert not cosines[1].any()
    assert not cosines[:, 2].any()
    assert not student.grad[1].any()
    assert student.grad[0].any()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("size", [1e-30, 1e-7, 1e7, 1e30])
def test_normalize_survives_rows_whose_squares_do_not_fit(size: float) -> None:
    rows = torch.randn(4, 8)
    torch.testing.assert_close(normalize(rows * size), normalize(rows), rtol=1e-6, atol=1e-6)
    if abs(torch.tensor(size).log10()) > 20:
        assert not torch.allclose(F.normalize(rows * size), normalize(rows))


def test_normalize_of_tiny_float16_rows() -> None:
    rows = torch.full((1, 4), 6e-8, dtype=torch.float16)
    torch.testing.assert_close(normalize(rows), torch.full((1, 4), 0.5))


def test_gradcheck() -> None:
    a = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cosine_similarity_matrix, (a, b))
    assert torch.autograd.gradcheck(normalize, (a,))


def test_pairwise_cosine_is_the_diagonal() -> None:
    a, b = torch.randn(6, 5), torch.randn(6, 5)
    torch.testing.assert_close(pairwise_cosine(a, b), cosine_similarity_matrix(a, b).diagonal())


@pytest.mark.parametrize("chunk", [None, 1, 3, 1000])
@pytest.mark.parametrize("k", [1, 4, 20])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_neighbours_equal_a_sort_of_the_matrix(chunk: int | None, k: int, exclude_self: bool) -> None:
    corpus = torch.randint(-1, 2, (21, 3)).double()  # full of duplicates, opposites and zero rows
    scores, indices = top_k_neighbours(corpus, corpus, k, exclude_self=exclude_self, chunk=chunk)
    expected = cosine_similarity_matrix(corpus, corpus).round(decimals=12)
    if exclude_self:
        expected.fill_diagonal_(-torch.inf)
    best = expected.sort(dim=-1, descending=True).values[:, :k]
    torch.testing.assert_close(scores, best)
    torch.testing.assert_close(expected.gather(1, indices), best)
    assert all(len(set(row)) == k for row in indices.tolist())
    assert not exclude_self or not (indices == torch.arange(21)[:, None]).any()


@pytest.mark.parametrize("k", [1, 3, 60])
def test_ties_go_to_the_lower_index(k: int) -> None:
    corpus = torch.eye(2).repeat(50, 1)
    _, indices = top_k_neighbours(torch.eye(2), corpus, k)
    _, expected = cosine_similarity_matrix(torch.eye(2), corpus).sort(dim=-1, descending=True, stable=True)
    assert torch.equal(indices, expected[:, :k])


def test_rows_with_and_without_ties_at_the_last_place_stand_side_by_side() -> None:
    corpus = torch.cat([torch.eye(4), torch.eye(4)[[1, 1, 2]]])
    queries = torch.tensor([[4.0, 3, 2, 1], [1.0, 2, 3, 4], [1.0, 4, 3, 2]])
    for k in range(1, 8):
        scores, indices = top_k_neighbours(queries, corpus, k)
        expected = cosine_similarity_matrix(queries, corpus).sort(dim=-1, descending=True, stable=True)
        assert torch.equal(indices, expected.indices[:, :k])
        assert torch.equal(scores, expected.values[:, :k])


def test_no_queries_have_no_neighbours() -> None:
    scores, indices = top_k_neighbours(torch.randn(0, 3), torch.randn(5, 3), 2)
    assert (scores.shape, indices.shape, indices.dtype) == ((0, 2), (0, 2), torch.int64)


def test_shapes_in_signatures_are_checked_in_tests() -> None:
    with pytest.raises(TypeCheckError):
        pairwise_cosine(torch.randn(2, 3), torch.randn(1, 3))


@pytest.mark.usefixtures("unchecked")
def test_errors_show_what_came_and_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"student \(2, 3\) and teacher \(4, 5\).*lead_to.*Linear\(3, 5\).*gram_kl"):
        cosine_similarity_matrix(torch.randn(2, 3), torch.randn(4, 5))
    with pytest.raises(ValueError, match=r"rows of vectors.*\(3,\)"):
        cosine_similarity_matrix(torch.randn(3), torch.randn(4, 3))
    with pytest.raises(ValueError, match="outer"):
        cosine_similarity_matrix(torch.randn(2, 3), torch.randn(4, 3), method="outer")
    with pytest.raises(ValueError, match=r"\(2, 3\) and teacher \(1, 3\)"):
        pairwise_cosine(torch.randn(2, 3), torch.randn(1, 3))
    with pytest.raises(ValueError, match="<= 3 corpus rows, got k=4"):
        top_k_neighbours(torch.randn(4, 3), torch.randn(4, 3), 4, exclude_self=True)
    with pytest.raises(ValueError, match="2 queries and 4 corpus rows"):
        top_k_neighbours(torch.randn(2, 3), torch.randn(4, 3), 1, exclude_self=True)
    for chunk in (0, -1):
        with pytest.raises(ValueError, match=f"at least one query at a time, got chunk={chunk}"):
            top_k_neighbours(torch.randn(2, 3), torch.randn(4, 3), 1, chunk=chunk)
    with pytest.raises(ValueError, match="NaN or infinite"):
        top_k_neighbours(torch.full((1, 3), torch.nan), torch.randn(4, 3), 1)
