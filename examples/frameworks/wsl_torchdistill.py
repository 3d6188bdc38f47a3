"""WSL as a loss of torchdistill, with the teacher in eval mode.

    pip install "weighted-soft-labels[frameworks]"

A torchdistill configuration imports this module under `dependencies`. The import registers the
names 'forward_in_eval_mode' and 'WSL':

    dependencies:
      - name: 'wsl_torchdistill'
    train:
      teacher:
        forward_proc: 'forward_in_eval_mode'
        requires_grad: False
      criterion:
        key: 'WeightedSumLoss'
        kwargs:
          sub_terms:
            wsl:
              criterion:
                key: 'WSL'
                kwargs:
                  temperature: 4.0
                  alpha: 2.25
              weight: 1.0

wsl_torchdistill.yaml in this folder is a whole configuration, with the paper's settings for
CIFAR-100. WSL contains the cross-entropy with the labels, so no other sub-term is needed.

Copy both lines of `teacher`. torchdistill's DistillationBox never calls `teacher.eval()`. With
`forward_batch_only` the teacher would use the statistics of each batch and its dropout, and every
step would change its running statistics, also with `requires_grad: False`. A loss sees the logits
alone and cannot notice.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torchdistill.common.constant import def_logger
from torchdistill.core.interfaces.registry import register_forward_proc_func
from torchdistill.losses.registry import register_mid_level_loss

from weighted_soft_labels import WSLLoss

logger = def_logger.getChild(__name__)

IoDict = Mapping[str, Mapping[str, Any]]  # module path, then 'input' or 'output'


@register_mid_level_loss
class WSL(WSLLoss):
    """:class:`weighted_soft_labels.WSLLoss` of the outputs that torchdistill recorded.

    Args:
        student_module_path: Module whose input or output holds the logits. The default '.' is the
            model itself. List any other module under `forward_hook` of the student.
        student_module_io: 'input' or 'output' of that module.
        teacher_module_path, teacher_module_io: The same for the teacher.
        student_output_key: Key of the logits if the output is a dict, such as 'out' for
            torchvision's segmentation models and 'logits' for Hugging Face's models.
        teacher_output_key: The same for the teacher.
        options: Options of WSLLoss: temperature, alpha, hard_weight, label_smoothing,
            ignore_index, reduction.
    """

    def __init__(
        self,
        student_module_path: str = ".",
        student_module_io: str = "output",
        teacher_module_path: str = ".",
        teacher_module_io: str = "output",
        student_output_key: str | None = None,
        teacher_output_key: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_io("student_module_io", student_module_io)
        check_io("teacher_module_io", teacher_module_io)
        self.student_source = (student_module_path, student_module_io, student_output_key)
        self.teacher_source = (teacher_module_path, teacher_module_io, teacher_output_key)

    def forward(
        self,
        student_io_dict: IoDict,
        teacher_io_dict: IoDict,
        targets: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if targets is None:
            raise ValueError(
                "WSL needs targets, because the weight depends on the labels, got None: "
                "pass targets to forward_process in the training loop"
            )
        student_logits = find_logits("student", student_io_dict, *self.student_source)
        teacher_logits = find_logits("teacher", teacher_io_dict, *self.teacher_source)
        return super().forward(student_logits, teacher_logits, targets)


def check_io(name: str, io: str) -> None:
    if io not in ("input", "output"):
        raise ValueError(f"{name} must be 'input' or 'output', got {io!r}")


def find_logits(model: str, io_dict: IoDict, path: str, io: str, key: str | None) -> Tensor:
    recorded = io_dict.get(path, {})
    if io not in recorded:
        raise ValueError(
            f"torchdistill has recorded no {io} of the {model}'s module {path!r}: "
            f"list that module in the configuration, under {model}: forward_hook: {io}"
        )
    logits = recorded[io]
    if isinstance(logits, Mapping):
        if key not in logits:
            keys = ", ".join(map(repr, logits))
            raise ValueError(
                f"the {model}'s {io} is a dict: "
                f"{model}_output_key must be one of {keys}, got {key!r}"
            )
        return logits[key]
    if key is not None:
        raise ValueError(
            f"the {model}'s {io} is not a dict: {model}_output_key must be None, got {key!r}"
        )
    return logits


@register_forward_proc_func
def forward_in_eval_mode(
    model: nn.Module, sample_batch: Any, targets: Any = None, supp_dict: Any = None, **kwargs: Any
) -> Any:
    """`forward_batch_only` of torchdistill, for a teacher that is not trained."""
    if model.training:
        logger.info("Switching the teacher to eval mode")
        model.eval()
    return model(sample_batch)


def existing_file(path: str) -> str:
    """The path, for `src_ckpt`. Without this check torchdistill uses random weights instead."""
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"src_ckpt must be a checkpoint of the teacher, but there is no file {path!r}"
        )
    return path
