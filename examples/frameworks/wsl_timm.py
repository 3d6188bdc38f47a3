r"""Weighted Soft Labels as a task of timm, for timm's own train.py with all of its recipes.

    pip install "weighted-soft-labels[frameworks]"
    # for train.py, which is not in timm's package
    git clone https://github.com/huggingface/pytorch-image-models
    python wsl_timm.py pytorch-image-models/train.py --data-dir imagenet \
        --model resnet18 --kd-model-name resnet34 \
        --kd-temperature 2 --distill-loss-weight 2.5 --smoothing 0

or `torchrun --nproc-per-node 8 wsl_timm.py ...`. Use this script where the recipe matters: EMA,
warmup, RandAugment, AdamW, clipping, timm's datasets. Use imagenet.py for the paper's recipe, for
several teachers, or for a loop to change.

As in timm, `--kd-temperature` is T, `--distill-loss-weight` is alpha and `--task-loss-weight` is
hard_weight, by default 1. If only hard_weight is given, alpha is 1 - hard_weight. `--smoothing`
smooths the labels, by default by 0.1. With mixup timm itself smooths the labels, and the weight is
computed with the smoothed labels. `--bce-loss` has no effect.

Without `--kd-model-name` timm trains without a teacher. A teacher of your own is
`--kd-model-name local-dir:FOLDER`, where FOLDER was written by `timm.models.save_for_hf`.
"""

import runpy
import sys

import timm.task
import torch
from torch import Tensor

from weighted_soft_labels import wsl_loss


class WSLTask(timm.task.LogitDistillationTask):
    """timm's task with another loss. Targets are class indices or class probabilities."""

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        student_logits = self.trainable_module(input)
        with torch.inference_mode():
            teacher_input = self.teacher.normalize_input(input, self.student_mean, self.student_std)
            teacher_logits = self.teacher(teacher_input)
        loss = wsl_loss(
            student_logits,
            teacher_logits,
            target,
            temperature=self.temperature,
            alpha=self.distill_loss_weight,
            hard_weight=self.task_loss_weight,
            label_smoothing=getattr(self.criterion, "smoothing", 0.0),
        )
        return {"loss": loss, "output": student_logits}


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: wsl_timm.py pytorch-image-models/train.py OPTIONS...")
    timm.task.LogitDistillationTask = WSLTask  # before train.py imports this name
    sys.argv.pop(0)
    runpy.run_path(sys.argv[0], run_name="__main__")
