"""The workdir of a run that is going on: its records and metrics, made again if they vanish."""

from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from dit_jax.training import metrics, workdir
from dit_jax.training.lock import WorkdirLock


class RunHome:
    """What a run writes into its workdir beside checkpoints and pictures, in the first process.

    Args:
        directory: the workdir.
        held: its lock; None in the other processes, which write nothing.
        config: of the experiment.
        announce: prints a line.

    Attributes:
        records: texts by file name; empty ones are not written.
        writers: of metrics, once they are made.
    """

    def __init__(
        self,
        directory: Path,
        held: WorkdirLock | None,
        config: ConfigDict,
        announce: Callable[[str], None],
    ):
        self.records: dict[str, str] = {}
        self.writers: list = []
        self._directory, self._held, self._config = directory, held, config
        self._files, self._announce = workdir.RunFiles(directory), announce

    def write_records(self) -> None:
        """Writes all records: the run is this configuration's from here on."""
        if self._held:
            for name, text in self.records.items():
                if text:
                    self._files.write(name, text)

    def create_writers(self, step: int, *, wandb: bool | None = None) -> list:
        """The writers of a run that goes on at `step`."""
        training = self._config.training
        self.writers[:] = metrics.create_writers(
            self._directory,
            resumed_at=step,
            tensorboard=training.tensorboard,
            wandb=training.wandb if wandb is None else wandb,
            config=self._config.to_dict(),
            name=self._config.name,
        )
        return self.writers

    def mend(self, step: int) -> None:
        """Makes the workdir again if somebody removed or moved it: the run itself is in memory.

        Raises:
            WorkdirError: another process uses it by now.
        """
        if not self._held:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        self._held.retake()
        written = self._files.mend()
        if not written:
            return
        remote = [writer for writer in self.writers if isinstance(writer, metrics.WandbWriter)]
        self.writers[:] = [*self.create_writers(step, wandb=False), *remote]
        self._announce(
            f"warning: {self._directory} was removed or moved while training: {', '.join(written)} "
            f"written again at step {step}, as will be the checkpoints from here on"
        )
