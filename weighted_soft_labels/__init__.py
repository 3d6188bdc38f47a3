"""Weighted Soft Labels (Zhou et al., ICLR 2021): a drop-in knowledge-distillation loss.

>>> import torch
>>> from weighted_soft_labels import wsl_loss
>>> student_logits = torch.tensor([[2.0, 0.5, -1.0]], requires_grad=True)
>>> teacher_logits = torch.tensor([[1.5, 1.0, -2.0]])
>>> loss = wsl_loss(student_logits, teacher_logits, torch.tensor([0]))
>>> loss.backward()
"""

from weighted_soft_labels.loss import WSLLoss, wsl_loss

__version__ = "0.1.0"
__all__ = ["WSLLoss", "wsl_loss"]
