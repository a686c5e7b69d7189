"""Training on one page: prepare, step, validate, save."""

from contextlib import closing
from pathlib import Path

from segtrain.config import TrainConfig, shared_values
from segtrain.distributed.group import init_distributed
from segtrain.engine.checkpoint_writer import CheckpointWriter
from segtrain.engine.environment import session_environment, training_device
from segtrain.engine.monitor import Monitor
from segtrain.engine.parallel import smallest_micro_batch
from segtrain.engine.preemption import Preemption
from segtrain.engine.run import open_run
from segtrain.engine.start import (
    build_learner,
    check_before_data,
    fit_to_memory,
    prepare_task,
    print_start,
    step_batches,
)
from segtrain.engine.state import TrainState
from segtrain.engine.validator import Validator


def train(config: TrainConfig) -> Path:
    """Train as configured, or resume the same run: >>> folder = segtrain.train(segtrain.compose("experiment=toy"))

    Of several processes (torchrun), each trains on its micro-batches; the first writes. UsageError or DataError.
    """
    check_before_data(config)
    with (
        Preemption() as preemption, init_distributed(shared_values(config)) as dist, open_run(config, dist) as run,
        training_device(config, dist) as device,
    ):  # fmt: skip
        with dist.main_process_first():
            saved = run.restore()  # the newest checkpoint of this run, None for a new one
            task = prepare_task(config, saved)
        fit_to_memory(config, task, dist, device, run, saved)
        state = TrainState(config.trainer, task.num_train, task.metric, saved)
        if saved is not None and state.finished and run.evaluation is not None:
            return run.report_finished(state)
        loss = task.loss()
        smallest_micro_batch(config, dist, loss)
        run.set_images(task.image_ids, saved)
        data = task.prepare(dist)  # checks files, fills the cache
        run.begin(state, task.classes, session_environment(config, dist, saved), task.contents)
        learner = build_learner(config, task, loss, dist, device, run, saved)
        del saved  # as large as the weights
        print_start(config, run, learner, task, state)
        batches = step_batches(config, data, state, dist, device, preemption)
        writer = CheckpointWriter(run.folder, config.trainer.keep_last, dist.main)
        with Monitor(run, learner, state) as monitor, writer, closing(batches):
            validator = Validator(task, learner, state, run, monitor, writer, preemption)
            preemption.stepping, signal = True, 0
            if state.validation_missing:  # stopped between a step and its validation
                validator.validate()
            for batch in monitor.timed(() if state.finished else batches):  # this process's part; [] for a stop
                divisor, progress, signal, late = dist.agree(
                    learner.count(batch), state.progress, preemption.signal, monitor.late_loss
                )
                monitor.check(late)  # the step before the last: the GPU never waits
                validator.evaluation = None
                if signal or progress >= 1:
                    break
                with monitor.naming(batch):
                    result = learner.step(batch, divisor or 1.0, state.step, progress)
                monitor.record(result)
                if state.save_due:
                    monitor.flush()  # nothing unchecked is saved
                    writer.save(learner, state, run)
                if state.validation_due:
                    validator.validate()
                    if state.stalled:
                        break
            monitor.flush()
            if signal:
                writer.save(learner, state, run)
                raise validator.stop(signal)
            if validator.evaluation is None:  # ended by the clock, or stopped between the last save and its validation
                writer.save(learner, state, run)
                writer.close()
                validator.validate()
            validator.finish()
    return run.folder
