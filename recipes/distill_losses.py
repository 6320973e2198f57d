"""Losses of distillation as functions of tensors, and the loop that never holds (tokens, vocabulary).

With z_s, z_t the logits of student and teacher of a token, T the temperature and y the token that came next:

    KL(p || q),   p = softmax(z_t / T), q = softmax(z_s / T)                                    (1)
    loss = alpha * T^2 * KL + (1 - alpha) * cross-entropy(z_s, y)                               (2)
    feature loss = || P h_s / ||P h_s|| - h_t / ||h_t|| ||^2                                    (3)

(1), (2): Hinton et al. (arXiv:1503.02531), Sec. 2: soft targets' gradients shrink as 1 / T^2, hence the factor.
(3): Patient KD (arXiv:1908.09355), Eq. 7, on every trained token; P, a linear map to the teacher's width: FitNets
(arXiv:1412.6550), Sec. 2.2.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LOGITS_AT_A_TIME = 2**26  # of each model: 256 MiB in fp32


class DistillationSums(NamedTuple):
    """Sums over tokens, () float32: Eq. 1 and the cross-entropy in nats, with gradients; right most likely tokens."""

    divergence: torch.Tensor
    cross_entropy: torch.Tensor
    correct: torch.Tensor


def teacher_divergence(student_logits, teacher_logits, temperature=1.0):
    """Eq. 1 of each token: (N, V) logits of any dtype -> (N,) float32 nats, differentiable by the student's."""
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def combined_loss(divergence, cross_entropy, alpha, temperature):
    """Eq. 2."""
    return alpha * temperature**2 * divergence + (1 - alpha) * cross_entropy


def feature_loss(student_states, teacher_states):
    """Eq. 3 of each token: two (N, D) of any dtype -> (N,) float32 in [0, 4]."""
    student, teacher = (F.normalize(states.float(), dim=-1) for states in (student_states, teacher_states))
    return (student - teacher).square().sum(-1)


def _chunk_sums(student_states, teacher_states, targets, student_head, teacher_head, temperature):
    student_logits = student_head(student_states)
    with torch.no_grad():
        teacher_logits = teacher_head(teacher_states)
    return (
        teacher_divergence(student_logits, teacher_logits, temperature).sum(),
        F.cross_entropy(student_logits.float(), targets, reduction="sum"),
        (student_logits.detach().argmax(-1) == targets).sum(),
    )


def distillation_sums(
    student_states, teacher_states, targets, student_head, teacher_head, temperature, tokens_at_a_time=None
):
    """Eq. 1 and cross-entropy summed over tokens; logits of both models are made chunk by chunk, again in backward.

    Args:
        student_states (N, D_s), teacher_states (N, D_t): last hidden states of the trained tokens, N may be 0.
        targets (N,) int64: the tokens that came next.
        student_head, teacher_head: (n, D) -> (n, V); the teacher's gets no gradient.
        tokens_at_a_time: None: as many as `LOGITS_AT_A_TIME` allows.
    Returns:
        DistillationSums; the first two carry gradients to `student_states` and the parameters of `student_head`.
    """
    if tokens_at_a_time is None:
        tokens_at_a_time = max(1, LOGITS_AT_A_TIME // student_head.weight.shape[0])
    sums = []
    for start in range(0, max(len(targets), 1), tokens_at_a_time):  # once for no token: the head takes part under DDP
        part = slice(start, start + tokens_at_a_time)
        sums.append(
            checkpoint(
                _chunk_sums, student_states[part], teacher_states[part], targets[part], student_head, teacher_head,
                temperature, use_reentrant=False,
            )
        )  # fmt: skip
    return DistillationSums(*(torch.stack(each).sum() for each in zip(*sums)))
