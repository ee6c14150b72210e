"""The part of the trainer that deals with turned coordinates: averages, saved models, and turning back at the end."""

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from hf_teleport.layers.roles import end_layer
from hf_teleport.methods.basis.averages import Average, averages_of, taken_in
from hf_teleport.report import SymmetryReport
from hf_teleport.settings.groups import reads
from hf_teleport.training.plan import Plan
from hf_teleport.weights.isolation import preserved_rng

# A type checker sees the mixin as a Trainer. At run time it can be mixed into any subclass of Trainer.
_Base: Any = Trainer if TYPE_CHECKING else object


class HomeMixin(_Base):
    """Keeps averages of the weights in step, saves the way back beside turned weights, and turns the model back."""

    _saving_at_home = False

    if TYPE_CHECKING:

        @property
        def _plan(self) -> Plan: ...

    def __init__(self, *args: Any, **kwargs: Any):
        self._averages: list[nn.Module | Mapping[str, Tensor]] = []
        super().__init__(*args, **kwargs)

    def register_average(self, average: nn.Module | Mapping[str, Tensor]) -> None:
        """Turn an average of the weights (EMA, SWA) along with the weights at each change of basis, and on the way back.

        You need not register averages that the trainer or its callbacks keep as attributes: `AveragedModel` of torch,
        `ModelEmaV3` of timm, `BEMACallback` and `SyncRefModelCallback` of TRL.

        Args:
            average: a module with the model's parameters, or tensors by the names of `named_parameters`. They change in place.

        Raises:
            ValueError: it lacks a trained parameter, or has one with another shape or sharded.
        """
        Average(self.model, average)
        self._averages.append(average)

    def turn_back(self) -> list[SymmetryReport]:
        """Turn the model and the optimizer's state back into the coordinates in which training began.

        This undoes all changes of basis since then. The weights keep what they have learned, and outputs do not change. By
        default a run that begins from saved weights ends with this (`turn_back`). Training may go on afterwards.

        Returns:
            The symmetries that had been turned. A symmetry with a reason stays turned, because its gain can neither be folded
            nor turned back.
        """
        self._take_in_averages(self._plan)
        with preserved_rng():
            found = self._teleporter(self._plan, self._plan.settings).turn_back()
        staying = {symmetry.name: symmetry.reason for symmetry in found if symmetry.reason}
        for name, reason in staying.items():
            self._tell(f"{name} stays turned: {reason}.", logging.WARNING)
        if len(staying) < len(found):
            self._tell("The weights are back in the coordinates in which training began.")
        return found

    def _end(self) -> None:
        if self._plan.turns_back:
            self.turn_back()

    def _take_in_averages(self, plan: Plan) -> None:
        """Give all averages of the weights to the tracker. Must not run inside `unnoted`, where attributes are copies."""
        if plan.tracker.way or reads(plan.settings.method, "turn_back"):
            plan.tracker.averages = taken_in(self.model, [*averages_of(self), *self._averages])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as Trainer does. If weights are turned, also save what is needed to turn them back (`hf-teleport turn-back`)."""
        folder, saving = output_dir or self.args.output_dir, self._saving_at_home
        home = not saving and self._plan.saves_at_home(self.model)
        with self._plan.tracker.way.trained_at_home(self._saved_frozen()) if home else nullcontext():
            try:
                self._saving_at_home = saving or home  # a push to the Hub calls save_model again
                super().save_model(output_dir, _internal_call)
            finally:
                self._saving_at_home = saving
        if self.args.should_save and Path(folder).is_dir():
            self._plan.save(folder, self.model)

    def _saved_frozen(self) -> set[nn.Parameter]:
        """Frozen weights that PEFT may save: of embedding and head, if an adapter is on them, and of adapters that are frozen."""
        model: Any = self.model
        ends = (end_layer(model.get_base_model(), "input"), end_layer(model.get_base_model(), "output"))
        saved = {parameter for end in ends if end is not None for parameter in end.parameters()}
        return saved | {p for name, p in model.named_parameters() if set(name.split(".")) & set(model.peft_config)}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self._plan.save(output_dir, self.model, self.state.global_step)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer copies the checkpoint's weights to output_dir for a push. Put the file for turning back beside them.
        going_on = self.push_in_progress is not None and not self.push_in_progress.is_done()
        skipped = self.args.hub_strategy == HubStrategy.END or (going_on and not self.args.hub_always_push)
        if self.is_world_process_zero() and not skipped:
            self._plan.save(self.args.output_dir, self.model)
        super()._push_from_checkpoint(checkpoint_folder)

    def _load_best_model(self) -> None:
        # Averages stay those of the last step, and go to the coordinates of the best checkpoint.
        self._take_in_averages(self._plan)
        tracker = self._plan.tracker
        way = tracker.way
        super()._load_best_model()
        if self._plan.saves_at_home(self.model):  # the saved adapters are turned back, so the base must be too
            self._plan.tracker.way.frozen.restore()
        self._plan.load(str(self.state.best_model_checkpoint), self.model)
        for average in tracker.averages:
            if why := way.move(average, tracker.way):
                self._tell(f"An average of the weights stays in the coordinates of the last step: {why}.", logging.WARNING)
