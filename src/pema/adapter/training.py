"""Training of an adapter on a memory, without the PLM: reconstruction, then joint retraining."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pema.adapter.checkpoint import Checkpoint, require_same_run
from pema.adapter.config import CORE, PAYS, SAMPLE, AdapterConfig, TrainConfig
from pema.adapter.copying import copyable
from pema.adapter.joint import JointRun
from pema.adapter.module import Adapter
from pema.adapter.private import train_privately
from pema.adapter.store import ADAPTER, CONFIG_FILE, require_free
from pema.console import note
from pema.errors import AdapterError, ConfigError
from pema.files import clear_below
from pema.locks import exclusive
from pema.memory.reader import Memory
from pema.memory.verify import verify
from pema.processes import Processes, join
from pema.schema import require_instance
from pema.storage.publishing import destination


def train(
    memory: Memory, config: TrainConfig, output: Path | str, *, resume: bool = False, tensorboard: bool = False
) -> tuple[Adapter, dict[str, Any]]:
    """Train an adapter and write it to `output`.

    The folder gets adapter_config.json, adapter_model.safetensors, README.md and training.jsonl. The config holds the
    schedule suited to the memory's contexts, and one fitted to the held-out examples if there are any. While it runs
    it also contains checkpoint/, from which `resume` continues bit for bit.

    Called in each of several processes that a launcher has started (`pema.processes`), it trains one adapter in all of
    them: the batches, the losses and the files are those of one process.

    With `dp_epsilon` it is differentially private, and nothing is logged (`pema.adapter.private`).

    Args:
        memory: the external memory.
        config: the settings.
        output: the adapter's folder, or its address in object storage: it is published once the training has ended.
        resume: continue from the checkpoint that a killed run left in `output`; start if there is none, and return
            the adapter if the run had ended.
        tensorboard: log for TensorBoard as well.

    Returns:
        The adapter with the lowest held-out loss (the last one if nothing is held out), and its figures.

    Raises:
        ExternalMemoryError: a file of the memory is damaged; every byte is verified before training starts.
        AdapterError: `output` already contains an adapter or a checkpoint without `resume`, or the loss is not finite.
        MismatchError: the checkpoint belongs to other settings or another memory.
        ConfigError: the settings do not fit the memory; TensorBoard with `dp_epsilon`; Opacus is not installed.
        StorageError: writing failed, or another process trains in the folder; the last checkpoint is kept.
    """
    require_instance("memory", memory, Memory, "open one with pema.Memory.open(folder)")
    require_instance("config", config, TrainConfig, "take a preset, such as pema.preset('best', epochs=5)")
    processes = join()
    if processes.count > 1 and config.dp_epsilon is not None:
        raise ConfigError(
            f"dp_epsilon with {processes.count} processes: private training runs in one. Start it without a launcher."
        )
    if not processes.is_writer:
        return _train(memory, _suited(config, memory), Path(output), resume, tensorboard, processes)
    with destination(output, ADAPTER) as folder, exclusive(folder):
        return _train(memory, _suited(config, memory), folder, resume, tensorboard, processes)


def _suited(config: TrainConfig, memory: Memory) -> TrainConfig:
    """Return the settings adapted to the width and the vocabulary of this memory."""
    config.require_suited(memory.manifest.plm)
    config, V = _copying(config.fitted(memory.d), memory), memory.manifest.plm.vocabulary_size
    config = config.with_steps(round((1 - config.dev_fraction) * memory.pairs))
    if config.vocabulary not in ("auto", "sampled"):
        return config
    small = config.vocabulary == "auto" and V < PAYS * SAMPLE  # whatever is seen: it need not be read
    seen = V if small else len(memory.view().targets_seen())
    chosen = config.with_vocabulary(V, seen)
    if config.vocabulary == "auto" and chosen.vocabulary == "sampled":
        drawn = f"{min(seen, CORE):,} of the {seen:,} tokens that occur, and {SAMPLE:,} drawn of the others"
        note(f"vocabulary='sampled': each step's softmax has {drawn}, for all V = {V:,}.")
    return chosen


def _copying(config: TrainConfig, memory: Memory) -> TrainConfig:
    """Return the settings without copying if too few target tokens can be copied."""
    if not config.copy_width or not config.copy_least:
        return config
    share = copyable(memory)
    if share >= config.copy_least:
        return config
    note(
        f"copying is left out: {share:.0%} of the target tokens occur in their prompts, below copy_least="
        f"{config.copy_least:g}."
    )
    return dataclasses.replace(config, copy_width=0)


def _train(
    memory: Memory, config: TrainConfig, output: Path, resume: bool, tensorboard: bool, processes: Processes
) -> tuple[Adapter, dict[str, Any]]:
    digest = str(memory.manifest.to_dict()["digest"])
    checkpoint = Checkpoint(output, config, digest)
    done = _done(output, checkpoint, resume) if processes.is_writer else None
    done = _of_writer(done, processes)
    if done is not None:
        return done, dict(done.config.training.get("figures", {}))
    verify(memory.path, processes)
    if config.dp_epsilon is not None:
        if tensorboard:
            raise ConfigError("tensorboard with dp_epsilon: the logged losses have no noise. Leave it out.")
        return train_privately(memory, config, output, checkpoint)
    run = JointRun(memory, config, output, checkpoint, tensorboard, processes)
    run.to_the_end()
    return run.finish(digest), dict(run.state.figures)


def _done(output: Path, checkpoint: Checkpoint, resume: bool) -> Adapter | None:
    """Return the adapter of a run that had ended; refuse an output that this run must not change."""
    clear_below(output)
    if not resume:
        _require_free(output, checkpoint)
    if not (output / CONFIG_FILE).exists() or checkpoint.exists():
        return None
    done = Adapter.from_pretrained(output)
    training, config = done.config.training, checkpoint.config
    # A private adapter does not contain its memory's digest, with which a guess of an example could be tested.
    of = checkpoint.memory if config.dp_epsilon else training.get("memory")
    require_same_run(training.get("settings", {}), of, config, checkpoint.memory, f"the adapter {output}")
    checkpoint.remove()
    return done


def _of_writer(adapter: Adapter | None, processes: Processes) -> Adapter | None:
    """Return the writer's adapter in all processes."""
    values: dict[str, Any] = {} if adapter is None else {"config": adapter.config.to_dict(), "name": adapter.name}
    values, tensors = processes.same(values, {} if adapter is None else adapter.state_dict())
    if adapter is not None or not values:
        return adapter
    return Adapter.of(AdapterConfig.from_dict(values["config"]), tensors, values["name"])


def _require_free(output: Path, checkpoint: Checkpoint) -> None:
    if checkpoint.exists():
        raise AdapterError(
            f"{output} contains the checkpoint of a training that has not ended: continue with --resume, "
            f"or remove {checkpoint.folder} to start again."
        )
    require_free(output)
