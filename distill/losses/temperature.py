"""The teacher's temperature, from how many texts each of its rows is to speak of."""

import math
import warnings

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill.losses.cross import check_keys
from distill.similarity import check_bank, check_matrix, cosine_similarity_matrix, evenly_spaced

# What is asked of an embedding model are lists of 10 to 100: at 30 a row of the teacher ranks those and all but leaves the
# rest. all-mpnet-base-v2 on 71,013 sentences: tau is .053 over 256 columns, .041 over 4,352, .039 over 65,792, where a
# fixed .07 would mean perplexities of 59, 457 and 3,126. t-SNE's customary ones are 5 to 50.
PERPLEXITY = 30.0
# Share of the rows above which there is a warning. At perplexity 30, 7 to 13 % of the rows put most weight on one column; at
# tau .02, 30 %.
MANY = 0.15
MOST_ROWS, MOST_COSINES, CHUNK_COSINES = 1024, 2**25, 2**21


def calibrate_temperature(
    teacher: Float[Tensor, "b e"],
    bank: Float[Tensor, "n e"] | None = None,
    *,
    perplexity: float = PERPLEXITY,
    keys: Int[Tensor, "b"] | None = None,
    bank_keys: Int[Tensor, "n"] | None = None,
) -> float:
    """The temperature at which the teacher's softmax rows have this perplexity: as if so many texts were equally likely.

    Equals the tau with exp(mean over i of the entropy of softmax(t_i . B / tau)) = perplexity, over the columns B of
    cross_kl: all teacher rows, then the bank, without row i's own and those of its key. Give as many as a training step has.
    UserWarning for rows that are flat, saturated, or held by one column.
    Rows are at most 1,024, evenly spaced, fewer where their cosines would take more than 128 MB: 2 * rows * (b + n) * e
    FLOP, then 26 passes over the cosines. Hinton and Roweis 2002 (perplexity of a row).
    """
    columns = _columns(teacher, bank)
    most = min(MOST_ROWS, max(1, MOST_COSINES // max(1, len(columns))))
    chosen = torch.tensor(evenly_spaced(len(teacher), most), dtype=torch.long, device=teacher.device)
    check_keys("calibrate_temperature", teacher, bank, keys, bank_keys)
    left_out = _left_out(chosen, len(columns), keys, bank_keys)
    cosines = cosine_similarity_matrix(columns[chosen], columns).masked_fill_(left_out, -math.inf)
    cosines = cosines[~left_out.all(-1)]
    _check_perplexity(perplexity, cosines)
    temperature = _bisect(perplexity, cosines)
    _warn(perplexity, temperature, cosines)
    return temperature


def _columns(teacher: Tensor, bank: Tensor | None) -> Float[Tensor, "n e"]:
    check_matrix("calibrate_temperature", teacher, "teacher")
    if bank is not None:
        check_bank("calibrate_temperature", teacher, bank)
    columns = teacher.detach() if bank is None else torch.cat([teacher.detach(), bank.detach()])
    if not columns.isfinite().all():
        rows = (~columns.isfinite().all(-1)).nonzero()[:, 0].tolist()
        raise ValueError(
            f"calibrate_temperature got {len(rows)} vectors with NaN or infinite entries, the first in row {rows[0]} of "
            "teacher and bank. Leave those texts out."
        )
    return columns


def _left_out(
    chosen: Int[Tensor, "q"], columns: int, keys: Tensor | None, bank_keys: Tensor | None
) -> Bool[Tensor, "q n"]:
    """Row i's own column, and those that carry its key. Bank rows without keys are other texts."""
    left_out = rearrange(chosen, "q -> q 1") == torch.arange(columns, device=chosen.device)
    if keys is not None:
        named = keys if bank_keys is None else torch.cat([keys, bank_keys])
        left_out[:, : len(named)] |= rearrange(keys[chosen], "q -> q 1") == named
    return left_out


def _check_perplexity(perplexity: float, cosines: Float[Tensor, "q n"]) -> None:
    columns = _geometric_mean(_counts(cosines)) if len(cosines) else 0.0
    if columns < 3:
        raise ValueError(
            f"calibrate_temperature needs 3 other texts for each row, got {columns:.3g}. Give more teacher rows, or a bank."
        )
    if not 1 < perplexity < columns:
        raise ValueError(
            f"a perplexity lies between 1 (all on one column) and the number of columns, here {columns:.5g}; got "
            f"{perplexity}. Try {min(PERPLEXITY, max(1.5, columns / 10)):.3g}, or give a larger bank."
        )


def _bisect(perplexity: float, cosines: Float[Tensor, "q n"]) -> float:
    low, high = math.log(1e-5), math.log(1e3)
    least = _geometric_mean(_rows_at(math.exp(low), cosines)[0])
    if least > perplexity:
        raise ValueError(
            f"no temperature gives perplexity {perplexity}: {least:.3g} columns share the highest cosine of a row. Equal "
            f"texts are left out by keys=; else ask for more than {least:.3g}."
        )
    for _ in range(24):  # halves: to 1e-6 of tau
        middle = (low + high) / 2
        above = _geometric_mean(_rows_at(math.exp(middle), cosines)[0]) > perplexity
        low, high = (low, middle) if above else (middle, high)
    return math.exp((low + high) / 2)


def _rows_at(temperature: float, cosines: Float[Tensor, "q n"]) -> tuple[Float[Tensor, "q"], Float[Tensor, "q"]]:
    """Each row's perplexity and its largest share, by row chunks."""
    perplexities, largest = [], []
    for chunk in cosines.split(max(1, CHUNK_COSINES // cosines.shape[1])):
        shares = (chunk / temperature).softmax(-1)
        perplexities.append(torch.special.entr(shares).sum(-1).exp())
        largest.append(shares.amax(-1))
    return torch.cat(perplexities), torch.cat(largest)


def _counts(cosines: Float[Tensor, "q n"]) -> Float[Tensor, "q"]:
    return (cosines > -math.inf).sum(-1).to(cosines.dtype)


def _geometric_mean(values: Float[Tensor, "q"]) -> float:
    return float(values.double().log().mean().exp())


def _warn(perplexity: float, temperature: float, cosines: Float[Tensor, "q n"]) -> None:
    perplexities, largest = _rows_at(temperature, cosines)
    rows, columns = len(cosines), _geometric_mean(_counts(cosines))
    flat = int((perplexities > _counts(cosines) / 2).sum())
    saturated, held = int((perplexities < 1.1).sum()), int((largest > 0.9).sum())
    at = f"of {rows:,} teacher rows at temperature {temperature:.3g}"
    if flat > MANY * rows:
        _say(
            f"{flat:,} {at} are flat: a perplexity above half of their {columns:,.0f} columns hardly tells near from far. "
            f"Ask for less than {perplexity:g}, or give a larger bank."
        )
    if saturated > MANY * rows:
        _say(
            f"{saturated:,} {at} are saturated: with a perplexity below 1.1 they name one text and say nothing of the "
            f"others. Ask for more than {perplexity:g}, and leave equal texts out by keys=."
        )
    elif held > MANY * rows:
        nearest = float(cosines[largest > 0.9].amax(-1).median())
        _say(
            f"{held:,} {at} give more than 0.9 to one column, of cosine {nearest:.2f} in the median, and say next to nothing "
            f"of other texts. Close to 1 these are near-duplicates: drop one of each two. Else ask for more than {perplexity:g}."
        )


def _say(message: str) -> None:
    warnings.warn(f"calibrate_temperature: {message}", UserWarning, stacklevel=4)  # where it was called
