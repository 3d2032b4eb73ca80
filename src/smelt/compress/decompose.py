"""Experts decomposed: a truncated SVD of every matrix, plain or data-aware, and rows of the rest.

Letters: G experts (after merging), E before it, O rows of a matrix (its outputs), I columns, R
rank, S sampled tokens, K choices, D model width, F hidden units. Work is float64, one matrix at a
time: nothing of a whole layer's size is made beside the result.

A *Gram* of an expert is the second moment of what its matrix reads (`grams_of`).
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from scipy.sparse.linalg import eigsh
from torch import Tensor

from smelt.errors import PlanError
from smelt.experts import ExpertBank
from smelt.factors import FactorBank, LowRankSparse

RIDGE = 1e-3
"""Share of a Gram's mean variance that is added in every direction: the sample may be small."""

Gram = Sequence[Tensor] | Tensor
"""[I, I] of each expert, all at once or made when asked for."""


def truncated_svd(
    weight: Float[Tensor, "G O I"],
    rank: int,
    gram: Gram | None = None,
    *,
    ridge: float = RIDGE,
) -> tuple[Float[Tensor, "G O R"], Float[Tensor, "G R I"]]:
    """U V of rank R nearest to each matrix, √σ folded into both; the same bytes every time.

    Args:
        gram: of what each expert's matrix reads. Then ‖(W − U V) L‖ is the least there is, L Lᵀ =
            Gram + ridge, and σ are the singular values of W L. An expert whose Gram is zero (no
            token reached it) gets the plain one.
        ridge: relative to the mean of the Gram's diagonal.

    From the eigenvectors of the smaller side's product in float64, which is as exact as a full SVD
    (of 3072 × 768: 1e-14 of the subspace, in a third of its time). `torch.svd_lowrank` with 8
    iterations is twice as fast, and 1–50 % of the subspace off where singular values fall slowly.

    Raises PlanError for a rank that is not 1 … min(O, I).
    """
    check_rank(rank, weight.shape[1], weight.shape[2])
    u = weight.new_empty(*weight.shape[:2], rank)
    v = weight.new_empty(weight.shape[0], rank, weight.shape[2])
    for g, matrix in enumerate(weight):
        lower = None if gram is None else _cholesky(gram[g], ridge)
        left, right = _nearest(matrix.double(), rank, lower)
        u[g], v[g] = left, right
    return u, v


def check_rank(rank: int, num_rows: int, num_columns: int) -> None:
    """Raise PlanError unless matrices of this shape can have the rank."""
    most = min(num_rows, num_columns)
    if not 1 <= rank <= most:
        raise PlanError(
            f"rank {rank}: a matrix of {num_rows} × {num_columns} has ranks 1 to {most}. Choose a "
            "smaller one."
        )


def _nearest(
    matrix: Float[Tensor, "O I"], rank: int, lower: Float[Tensor, "I I"] | None
) -> tuple[Float[Tensor, "O R"], Float[Tensor, "R I"]]:
    """U, V of one matrix: nearest after both are multiplied by `lower`."""
    seen = matrix if lower is None else matrix @ lower
    if matrix.shape[0] <= matrix.shape[1]:
        basis = _leading(seen @ seen.T, rank)  # of the outputs
        root = torch.linalg.vector_norm(basis.T @ seen, dim=1).sqrt()
        return basis * root, _divided(basis.T @ matrix, root[:, None])
    basis = _leading(seen.T @ seen, rank)  # of the inputs, as `lower` turns them
    left = seen @ basis
    root = torch.linalg.vector_norm(left, dim=0).sqrt()
    right = basis.T
    if lower is not None:
        right = torch.linalg.solve_triangular(lower, right, upper=False, left=False)
    return _divided(left, root), right * root[:, None]


def _leading(product: Float[Tensor, "I I"], rank: int) -> Float[Tensor, "I R"]:
    """The eigenvectors of the largest eigenvalues, largest first; their largest entry positive."""
    vectors: Tensor = torch.linalg.eigh(product)[1][:, -rank:].flip(1)
    peak = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * peak.sign()


def _divided(value: Tensor, by: Tensor) -> Tensor:
    """The quotient; 0 where σ is 0."""
    return torch.where(by > 0, value / by.clamp(min=torch.finfo(by.dtype).tiny), 0.0)


def _cholesky(gram: Float[Tensor, "I I"], ridge: float) -> Float[Tensor, "I I"] | None:
    """L of Gram + ridge · mean variance; None where the Gram is zero."""
    wide = gram.double()
    mean = wide.diagonal().mean()
    if not torch.isfinite(mean):
        raise PlanError(
            "A Gram has NaN or Inf: the calibration text overflowed, or the weights are damaged. "
            "Calibrate in float32."
        )
    if mean <= 0:
        return None
    shift = ridge
    while True:  # rounding may leave a rank-deficient Gram just below zero
        eye = torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
        found = torch.linalg.cholesky_ex(wide + shift * mean * eye)
        if not found.info:
            lower: Tensor = found.L
            return lower
        shift = max(10 * shift, 1e-14)


def spectrum(
    weight: Float[Tensor, "G O I"],
    gram: Gram | None = None,
    *,
    ridge: float = RIDGE,
) -> Float[Tensor, "G S"]:
    """Singular values of each matrix, largest first, float64; of W L where there is a Gram."""
    found = []
    for g, matrix in enumerate(weight):
        seen = matrix.double()
        lower = None if gram is None else _cholesky(gram[g], ridge)
        if lower is not None:
            seen = seen @ lower
        wide = seen.shape[0] <= seen.shape[1]
        product = seen @ seen.T if wide else seen.T @ seen
        found.append(torch.linalg.eigvalsh(product).clamp(min=0).sqrt().flip(0))
    return torch.stack(found)


def stable_rank(weight: Float[Tensor, "E O I"]) -> Float[Tensor, " E"]:
    """‖W‖_F² / ‖W‖₂² of each matrix, float64: how many directions it spreads over; 0 for W = 0.

    Source: M-SMoE, arXiv:2310.01334, which finds it lower after merging.
    """
    found = []
    for matrix in weight:
        wide = matrix.float()
        product = (wide @ wide.T if len(wide) <= wide.shape[1] else wide.T @ wide).double()
        total = float(product.trace())
        if total == 0:
            found.append(0.0)
        elif len(product) < 3:
            found.append(total / float(torch.linalg.eigvalsh(product)[-1]))
        else:  # Lanczos, from a start that is always the same
            top = eigsh(
                product.cpu().numpy(), 1, v0=product.sum(1).cpu().numpy(), return_eigenvectors=False
            )
            found.append(total / float(top[0]))
    return torch.tensor(found, dtype=torch.float64)


# --- rows of the rest ----------------------------------------------------------------------------


def row_scores(residual: Float[Tensor, "G O I"], gram: Gram | None = None) -> Float[Tensor, "G O"]:
    """What each row s of S is worth per stored entry, float64.

    Its mean squared entry; with a Gram, s Gram sᵀ / I: the mean squared output that is lost with
    it, per entry. (They agree where the Gram is the identity.)
    """
    found = []
    for g, matrix in enumerate(residual):
        wide = matrix.double()
        other = wide if gram is None else wide @ gram[g].double()
        found.append((wide * other).mean(1))
    return torch.stack(found)


def residual_scores(
    weight: Float[Tensor, "G O I"],
    u: Float[Tensor, "G O R"],
    v: Float[Tensor, "G R I"],
    gram: Gram | None = None,
) -> Float[Tensor, "G O"]:
    """`row_scores` of S = W − U V, one expert at a time."""
    each = []
    for g, matrix in enumerate(weight):
        one = None if gram is None else [gram[g]]
        each.append(row_scores((matrix.double() - u[g].double() @ v[g].double())[None], one))
    return torch.cat(each)


def choose_rows(
    scores: Sequence[Float[Tensor, "_ _"]], lengths: Sequence[int], share: float
) -> list[Bool[Tensor, "_ _"]]:
    """Which rows of S are kept: those above one threshold over all matrices of all layers.

    Args:
        scores: of each matrix's rows. Equal ones: the earlier matrix, then the lower row.
        lengths: entries of a row of each matrix.
        share: of all entries, that are kept at most; short of it by less than one row.

    Raises PlanError for a share outside 0 … 1, and for scores that are NaN.

    Source: METHODS of MC-SMoE (arXiv:2310.01334). Differs from the authors' code, which expands
    the scores to full matrices: rows are compared by score, and weighed by their length.
    """
    if not 0 <= share <= 1:
        raise PlanError(f"A share of {share} of the rows: it is between 0 and 1.")
    flat = torch.cat([s.double().flatten() for s in scores])
    if flat.isnan().any():
        raise PlanError(
            "Row scores are NaN, so no row can be preferred to another. Training diverged or the "
            "weights are damaged: look at the loss, and lower the learning rate."
        )
    length = torch.cat(
        [
            torch.full((s.numel(),), n, dtype=torch.int64)
            for s, n in zip(scores, lengths, strict=True)
        ]
    )
    order = torch.sort(flat, descending=True, stable=True).indices.cpu()
    # An exact share must not be missed by rounding: 0.1 · 30 is 3.0000000000000004.
    budget = share * int(length.sum()) * (1 + 1e-12)
    num_kept = int((length[order].cumsum(0) <= budget).sum())
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[order[:num_kept]] = True
    parts = kept.split([s.numel() for s in scores])
    return [part.view(s.shape).to(s.device) for part, s in zip(parts, scores, strict=True)]


def pack(
    weight: Float[Tensor, "G O I"],
    u: Float[Tensor, "G O R"],
    v: Float[Tensor, "G R I"],
    mask: Bool[Tensor, "G O"],
) -> LowRankSparse:
    """U, V and the rows of S = W − U V that the mask keeps; S by the factors as they are stored."""
    ids = mask.flatten().nonzero().squeeze(1)
    rows = weight.new_empty(len(ids), weight.shape[2])
    start = 0
    for g, own in enumerate(mask):
        stop = start + int(own.sum())
        exact = weight[g][own].double() - u[g][own].double() @ v[g].double()
        rows[start:stop] = exact
        start = stop
    return LowRankSparse(u, v, rows, ids.int())


def decompose(
    bank: ExpertBank,
    ranks: Mapping[str, int],
    rows: Mapping[str, Bool[Tensor, "G O"]] | float,
    grams: Mapping[str, Gram] | None = None,
    *,
    ridge: float = RIDGE,
) -> FactorBank:
    """The bank with each matrix as U V and a few rows of S.

    Args:
        ranks: R of "up", "down" and, where there is one, "gate".
        rows: by matrix, which rows of S are kept; or a share of the entries, decided for this
            layer alone (by `residual_scores` with the same Grams).
        grams: by matrix (`grams_of`). None: the plain SVD, and rows by their mean square.
    """
    weights = matrices_of(bank)
    factors = {
        m: truncated_svd(w, ranks[m], None if grams is None else grams[m], ridge=ridge)
        for m, w in weights.items()
    }
    if isinstance(rows, float | int):
        scores = [
            residual_scores(w, *factors[m], None if grams is None else grams[m])
            for m, w in weights.items()
        ]
        lengths = [w.shape[2] for w in weights.values()]
        rows = dict(zip(weights, choose_rows(scores, lengths, rows), strict=True))
    packed = {m: pack(w, *factors[m], rows[m]) for m, w in weights.items()}
    return FactorBank(
        up=packed["up"],
        down=packed["down"],
        gate=packed.get("gate"),
        up_bias=bank.up_bias,
        gate_bias=bank.gate_bias,
        down_bias=bank.down_bias,
        activation=bank.activation,
    )


def matrices_of(bank: ExpertBank) -> dict[str, Float[Tensor, "G O I"]]:
    """The matrices of a bank by name: "gate" (where there is one), "up", "down"."""
    named = {"gate": bank.gate, "up": bank.up, "down": bank.down}
    return {name: weight for name, weight in named.items() if weight is not None}
