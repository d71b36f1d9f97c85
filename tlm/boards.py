"""Where curves go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

All three are kept in the run folder, unless the environment says otherwise as their users know it (WANDB_MODE and
`wandb login`, MLFLOW_TRACKING_URI). A run that goes on from a checkpoint goes on in the same curves, without the steps
that a kill left behind showing twice. None of them decides anything: the same run without boards has the same result.
"""

import hashlib
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from tasks.errors import InputError
from tlm import config as configs
from tlm.config import TrainConfig

PROJECT = "tlm"  # of Weights & Biases; the experiment of MLflow


@dataclass
class Boards:
    """The boards of one stage, none to three; each has `write` and `close` too."""

    kept: Sequence[Any]

    def write(self, values: Mapping[str, float | None], step: int) -> None:
        """`values` by name, None where there is none, of `step` of the stage."""
        known = {name: value for name, value in values.items() if value is not None}
        for board in self.kept:
            board.write(known, step)

    def close(self) -> None:
        for board in self.kept:
            board.close()


def open_boards(kinds: Sequence[str], run_folder: Path, stage_name: str, config: TrainConfig, step: int) -> Boards:
    """The boards of a stage that goes on after `step`. Only the process that writes opens any."""
    return Boards([OPEN[kind](run_folder, stage_name, config, step) for kind in kinds])


def check_boards(kinds: Sequence[str]) -> None:
    """Raises InputError if a board's package is missing; to be called before anything is trained."""
    for kind in kinds:
        module, name, package = NEEDS[kind]
        try:
            getattr(import_module(module), name)  # a folder of the same name is a module, too
        except (ImportError, AttributeError):
            raise InputError(f"boards={kind}: {package} is missing; pip install {package}") from None


class TensorBoard:
    """One TensorBoard run a stage. Points after `step`, which a kill left behind, are hidden."""

    def __init__(self, run_folder: Path, stage_name: str, config: TrainConfig, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run_folder / "tensorboard" / stage_name), purge_step=step + 1)

    def write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """One Weights & Biases run a run folder: its identifier is a function of the folder and its configuration.

    Names begin with the stage; steps count on over both stages. A run begun anew replaces one of the same identifier;
    one that goes on appends to it, and W&B drops steps that it has already: after a kill they have the same values,
    after a rewind those from before it stay.
    """

    def __init__(self, run_folder: Path, stage_name: str, config: TrainConfig, step: int):
        import wandb

        self.stage, self.before = stage_name, steps_before(stage_name, config)
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                id=identifier(run_folder, config),
                name=run_folder.name,
                dir=str(run_folder),
                config=configs.to_dict(config),
                resume="allow" if self.before + step else None,
                settings=wandb.Settings(silent=True, console="off"),  # standard output is for results
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"boards=wandb: refused ({reason}); run `wandb login`, or set WANDB_MODE=offline"
            ) from None

    def write(self, values: Mapping[str, float], step: int) -> None:
        self.run.log({f"{self.stage}/{name}": value for name, value in values.items()}, step=self.before + step)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """One MLflow run a run folder, in its subfolder `mlflow` or where MLFLOW_TRACKING_URI says.

    The subfolder is MLflow's file store: a database needs two more packages and seconds of migrations for each run.
    `mlflow ui --backend-store-uri RUN/mlflow` shows it. Names and steps are as with Weights & Biases.
    """

    def __init__(self, run_folder: Path, stage_name: str, config: TrainConfig, step: int):
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3.10 and later want to be asked
        self.stage, self.before = stage_name, steps_before(stage_name, config)
        self.written: dict[str, int] = {}  # last step by name
        store = os.environ.get("MLFLOW_TRACKING_URI") or (run_folder / "mlflow").absolute().as_uri()
        try:
            self.client = MlflowClient(tracking_uri=store)
            self.id = self.find(run_folder, config)
        except MlflowException as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"boards=mlflow: refused ({reason}); mend or unset MLFLOW_TRACKING_URI") from None

    def find(self, run_folder: Path, config: TrainConfig) -> str:
        """The identifier of the folder's MLflow run, which is made where there is none."""
        from mlflow.entities import Param

        known, tag = self.client.get_experiment_by_name(PROJECT), identifier(run_folder, config)
        experiment = known.experiment_id if known else self.client.create_experiment(PROJECT)
        found = self.client.search_runs([experiment], filter_string=f"tags.tlm = '{tag}'", max_results=1)
        if found:
            self.client.update_run(found[0].info.run_id, status="RUNNING")
            return found[0].info.run_id
        run = self.client.create_run(experiment, tags={"tlm": tag}, run_name=run_folder.name)
        parameters = [Param(key, str(value)) for key, _, value, _ in configs.rows_of(config)]
        self.client.log_batch(run.info.run_id, params=parameters)
        return run.info.run_id

    def write(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        step, now, fresh = self.before + step, int(1000 * time.time()), []
        for name, value in ((f"{self.stage}/{name}", value) for name, value in values.items()):
            if name not in self.written:
                self.written[name] = max((m.step for m in self.client.get_metric_history(self.id, name)), default=-1)
            if step > self.written[name]:  # else it is kept as it was, as with Weights & Biases
                fresh.append(Metric(name, value, now, step))
                self.written[name] = step
        try:
            self.client.log_batch(self.id, metrics=fresh)
        except MlflowException as error:  # a server that is away for a while is no reason to stop training
            warnings.warn(f"boards=mlflow: step {step} is not written ({' '.join(str(error).split())[:300]})")

    def close(self) -> None:
        self.client.set_terminated(self.id)


OPEN: dict[str, Callable] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow}
NEEDS = {
    "tensorboard": ("tensorboard", "program", "tensorboard"),
    "wandb": ("wandb", "init", "wandb"),
    "mlflow": ("mlflow", "MlflowClient", "mlflow-skinny"),
}


def identifier(run_folder: Path, config: TrainConfig) -> str:
    return hashlib.sha256(f"{run_folder.name} {configs.sha256(config)}".encode()).hexdigest()[:16]


def steps_before(stage_name: str, config: TrainConfig) -> int:
    """Optimizer steps of the stages before this one."""
    return config.joint.steps if stage_name == "finetune" else 0
