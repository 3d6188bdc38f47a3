"""Weighted Soft Labels as a task of timm, for timm's own train.py with all of its recipes.

    pip install "weighted-soft-labels[frameworks]"
    git clone https://github.com/huggingface/pytorch-image-models      # for train.py, which is not in timm's package
    python wsl_timm.py pytorch-image-models/train.py --data-dir imagenet --model resnet18 --kd-model-name resnet34 \
        --kd-temperature 2 --distill-loss-weight 2.5 --smoothing 0

or `torchrun --nproc-per-node 8 wsl_timm.py ...`. Take it rather than imagenet.py where the recipe matters: EMA, warmup,
RandAugment, AdamW, clipping, timm's datasets. Take imagenet.py for the paper's recipe, for several teachers, or for a
loop to change.

As in timm, `--kd-temperature` is T, `--distill-loss-weight` is alpha and `--task-loss-weight` is hard_weight (1; given
alone, alpha is 1 minus it). Labels are smoothed by `--smoothing`, whose default is 0.1; with mixup timm smooths them
itself, and then the weight is that of the smoothed labels. `--bce-loss` has no effect. A teacher of your own is
`--kd-model-name local-dir:FOLDER`, where FOLDER was written by `timm.models.save_for_hf`.
"""

import runpy
import sys

import timm.task
import torch
from torch import Tensor

from weighted_soft_labels import wsl_loss


class WSLTask(timm.task.LogitDistillationTask):
    """Student and teacher are timm's; only the loss is another. Targets are class indices or class probabilities."""

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        student_logits = self.trainable_module(input)
        with torch.inference_mode():
            teacher_logits = self.teacher(
                self.teacher.normalize_input(input, self.student_mean, self.student_std)
            )
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
    timm.task.LogitDistillationTask = WSLTask  # before train.py imports it by this name
    sys.argv.pop(0)
    runpy.run_path(sys.argv[0], run_name="__main__")
