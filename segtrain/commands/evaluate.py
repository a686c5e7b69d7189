"""`segtrain evaluate`: the scores of a checkpoint on a split."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from segtrain.config import EvaluateConfig, checkpoint_line, classifies, refuse_other_task, shared_values
from segtrain.console import say
from segtrain.device import describe_device, resolve_device
from segtrain.distributed.group import init_distributed
from segtrain.engine.planning.automatic import advising
from segtrain.files import as_component
from segtrain.models.execution import require_inference_compile
from segtrain.models.precision import require_precision
from segtrain.scoring.engine import read_engine
from segtrain.scoring.predictor import LoadedNetwork, load_network
from segtrain.scoring.report import file_hash, print_table
from segtrain.tasks.base import Evaluator, NetworkFacts
from segtrain.tasks.classification import ClassificationEvaluator
from segtrain.tasks.exported import EngineEvaluator
from segtrain.tasks.segmentation import SegmentationEvaluator


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score a checkpoint, print the table and write evaluation.json. Returns its content, fractions."""
    if config.engine is not None:
        return evaluate_engine(config, Path(config.engine))
    with init_distributed(shared_values(config)) as dist:
        device, data = resolve_device(config.device), config.dataset
        path, split = Path(config.checkpoint or ""), config.split or data.val_split
        require_precision(config.inference.precision, device)
        loaded = load_network(path, device, config.checkpoint_weights, config.activation)
        if config.inference.compile:
            require_inference_compile(loaded.options, device)
        refuse_other_task(path, loaded.options.head, type(data), data.name)
        step = loaded.metadata["step"]
        say(f"checkpoint  {checkpoint_line(path, config.run, loaded.metadata)}")
        say(f"evaluating  {data.name} {split}, {config.inference}, on {describe_device(device)}")
        evaluator: Evaluator[Any]
        if classifies(data):
            evaluator = ClassificationEvaluator.of_checkpoint(config, path, loaded)
        else:
            evaluator = SegmentationEvaluator.of_checkpoint(config, path, loaded)
        trained_on = loaded.metadata.get("trained_on")
        made_by = {
            "processes": dist.size, "weights": "averaged" if loaded.averaged else "raw",
            "activation": loaded.options.activation, "checkpoint_sha256": file_hash(path), "step": step,
        }  # fmt: skip
        if path.name == "best.pt":
            made_by["selected_on"] = loaded.metadata["config"]["dataset"].get("val_split")
        facts = NetworkFacts(str(path), step, trained_on, made_by | evaluator.published(loaded))
        with advising(loaded.options, loaded.network.num_classes, config.inference, device):
            evaluation = evaluator.run(
                loaded.network, device, dist, config.loader.count(), figures=config.pictures, facts=facts
            )
        if dist.main:
            print_table(evaluation.result)
            folder = result_folder(config, path, loaded, split)
            folder = folder if config.output else beside_another(folder, evaluation.result)
            say(str(evaluation.write(folder, examples=True)))
        return evaluation.result


def evaluate_engine(config: EvaluateConfig, path: Path) -> dict[str, Any]:
    """Score a file of `segtrain export`, beside its checkpoint if that is given; else as `evaluate`."""
    with init_distributed(shared_values(config)) as dist:
        device, data, engine = torch.device("cpu"), config.dataset, read_engine(path)
        loaded = None
        if config.checkpoint is not None:
            loaded = load_network(Path(config.checkpoint), device, config.checkpoint_weights)
        evaluator = EngineEvaluator.of_engine(config, engine, loaded)
        say(f"engine      {path}, of {engine.metadata['checkpoint']}, step {engine.metadata['step']}")
        say(f"beside      {config.checkpoint or 'nothing: checkpoint=FILE compares its pixels'}")
        how = f"{config.inference}, on {describe_device(device)}"
        say(f"evaluating  {data.name} {evaluator.split}, {how}")
        trained_on = None if loaded is None else loaded.metadata.get("trained_on")
        facts = NetworkFacts(
            str(path), engine.metadata["step"], trained_on, {"processes": dist.size, "engine_sha256": file_hash(path)}
        )
        network = torch.nn.Identity() if loaded is None else loaded.network
        evaluation = evaluator.run(network, device, dist, config.loader.count(), figures=config.pictures, facts=facts)
        if dist.main:
            print_table(evaluation.result)
            say(engine_line(evaluation.result["engine"]))
            name = as_component("-".join([data.name, evaluator.split, config.inference.name]))
            given = Path(config.output) if config.output else None
            folder = given or beside_another(Path("segtrain-out/evaluate") / path.name / name, evaluation.result)
            say(str(evaluation.write(folder, examples=True)))
        return evaluation.result


def engine_line(found: dict[str, Any]) -> str:
    """'engine      0 of 1000 pixels changed from the checkpoint, whose mIoU is 37.10 %; ...'"""
    batched = f"{found['changed_by_batch']} of {found['batched_pixels']} by a batch of two"
    if "pixels" not in found:
        return f"engine      pixels changed: {batched}"
    return (
        f"engine      {found['changed_pixels']} of {found['pixels']} pixels changed from the checkpoint, whose mIoU is "
        f"{100 * found['miou_of_checkpoint']:.2f} %; {batched}"
    )


def beside_another(folder: Path, result: dict[str, Any]) -> Path:
    """The folder; if it has an evaluation with other inference.* options or weights, one beside it, named by these."""

    def made(content: dict[str, Any]) -> dict[str, Any]:
        weights = (content.get("protocol") or {}).get("weights") or "raw"
        return {**content["inference"], "weights": weights}

    try:
        earlier = made(json.loads((folder / "evaluation.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return folder  # none, or none that can be read
    now = made(result)
    if all(earlier.get(key, value) == value for key, value in now.items()):
        return folder
    mark = hashlib.sha256(json.dumps(now, sort_keys=True).encode()).hexdigest()[:8]
    say(f"beside      {folder}, an evaluation with other inference.* options or weights")
    return folder.with_name(f"{folder.name}-{mark}")


def result_folder(config: EvaluateConfig, path: Path, loaded: LoadedNetwork, split: str) -> Path:
    """output=, or else a folder in the run of the checkpoint, named by what is evaluated and how."""
    if config.output:
        return Path(config.output)
    activation = [config.activation] if config.activation else []
    mapped = [] if config.taxonomy == "none" else [Path(config.taxonomy).stem.replace(":", "-")]
    mapped += [config.taxonomy_rest] if mapped and config.taxonomy_rest != "void" else []
    best = ["best"] if path.name == "best.pt" else []  # beside the scores of last.pt
    half = [] if config.inference.precision == "fp32" else [config.inference.precision]
    how = [config.inference.name, *half, *activation, *mapped, *best]
    name = as_component("-".join([config.dataset.name, split, *how]))
    is_published = "report" in loaded.metadata
    return (Path("segtrain-out/evaluate") / path.name if is_published else path.parent / "evaluations") / name
