"""The commands: what each is for, its options, the function that runs it, three examples."""

from typing import NamedTuple

from segtrain import config

SECTIONS = ("data", "train", "results", "use")


class Command(NamedTuple):
    section: str
    summary: str
    schema: type[config.CommandConfig]
    function: str  # module:name
    bare: str | None  # the option that a bare path stands for
    examples: tuple[str, ...]


COMMANDS = {
    "streets": Command(
        "data", "write the built-in street scenes", config.StreetsCommandConfig,
        "segtrain.data.sets.streets:streets", "output",
        ("segtrain streets output=scenes",
         "segtrain streets output=kitti_like layout=kitti scenes=20",
         "segtrain streets output=large size=[512,1024] seed=3"),
    ),
    "check": Command(
        "data", "verify a dataset: files, sizes, labels and their contents", config.CheckConfig,
        "segtrain.commands.check:check", None,
        ("segtrain check dataset=cityscapes dataset.root=/data/cityscapes",
         "segtrain check dataset=kitti split=val output=checked",
         "segtrain check dataset=folder dataset.root=/data/mine write_config=mine.yaml"),
    ),
    "convert-labels": Command(
        "data", "write the labels of annotation tools as label images of class ids", config.ConvertLabelsConfig,
        "segtrain.commands.convert_labels:convert_labels", "input",
        ("segtrain convert-labels input=/data/mine output=labels",
         "segtrain convert-labels input=/data/coco/annotations/instances_val2017.json order=area",
         "segtrain convert-labels input=/data/export format=label_studio classes=classes.csv unlabelled=void"),
    ),
    "show": Command(
        "data", "draw training samples as the network sees them", config.ShowConfig,
        "segtrain.commands.show:show", None,
        ("segtrain show dataset=streets",
         "segtrain show dataset=mine.yaml augmentation=colour 'augmentation.crop_size=[256,320]' count=12",
         "segtrain show dataset=cityscapes sampling=class_uniform output=seen"),
    ),
    "train": Command(
        "train", "train a network, or resume an interrupted run", config.TrainConfig,
        "segtrain.engine.train:train", None,
        ("segtrain train experiment=toy",
         "segtrain train model=resnext50 dataset=cityscapes dataset.root=/data/cityscapes",
         "segtrain train experiment=toy optimizer.lr=0.02 name=higher_rate"),
    ),
    "plan": Command(
        "train", "plan memory: what fits on a GPU, and which options make it fit", config.PlanCommandConfig,
        "segtrain.commands.plan:plan", None,
        ("segtrain plan experiment=cityscapes_resnext101 plan.device_memory=12GB plan.devices=4",
         "segtrain plan experiment=cityscapes_wider_resnet38 model.keep=8bit plan.device_memory=24GiB",
         "segtrain plan experiment=toy output=planned"),
    ),
    "replay": Command(
        "train", "rebuild and draw the batch of any step of a run", config.ReplayConfig,
        "segtrain.commands.replay:replay", "run",
        ("segtrain replay runs/toy step=18",
         "segtrain replay run=runs/toy step=18 output=looked_at",
         "segtrain replay run=runs/cityscapes_resnext101 step=18204 root=/data/cityscapes"),
    ),
    "verify-resume": Command(
        "train", "prove that a killed run of your configuration resumes exactly", config.VerifyConfig,
        "segtrain.commands.verify_resume:verify_resume", None,
        ("segtrain verify-resume experiment=toy output=proof",
         "segtrain verify-resume dataset=cityscapes model=resnext50 trainer.batch_size=4 device=cuda",
         "segtrain verify-resume experiment=toy trainer.ema_decay=0.99 optimizer=adamw"),
    ),
    "runs": Command(
        "train", "list runs with progress, score and time, or beside the paper's results", config.RunsConfig,
        "segtrain.commands.runs:runs", "root",
        ("segtrain runs sort=miou output=runs.csv", "segtrain runs root=/data/runs seeds=each",
         "segtrain runs table=paper"),
    ),
    "evaluate": Command(
        "results", "score a checkpoint on a split", config.EvaluateConfig,
        "segtrain.commands.evaluate:evaluate", "checkpoint",
        ("segtrain evaluate runs/toy/last.pt",
         "segtrain evaluate checkpoint=runs/toy/best.pt split=night dataset.night_scenes=20",
         "segtrain evaluate wide_resnet38_deeplab_vistas.pth.tar dataset=vistas inference=vistas_official"),
    ),
    "score": Command(
        "results", "score label PNGs from any source by the dataset's own rules", config.ScoreConfig,
        "segtrain.commands.score:score", "predictions",
        ("segtrain score predictions=results dataset=cityscapes dataset.root=/data/cityscapes",
         "segtrain score predictions=results dataset=kitti split=val predictions_encoding=train_ids",
         "segtrain score predictions=results dataset=cocostuff dataset.classes=stuff91 output=scores"),
    ),
    "compare": Command(
        "results", "compare evaluations: differences with 95 % intervals, spread of seeds", config.CompareConfig,
        "segtrain.commands.compare:compare", "inputs",
        ("segtrain compare runs/a runs/b",
         "segtrain compare runs/a/evaluations/kitti-val-whole runs/b/evaluations/kitti-val-multiscale",
         "segtrain compare runs/a_seed0 runs/a_seed1 runs/b_seed0 runs/b_seed1 output=compared"),
    ),
    "report": Command(
        "results", "write one HTML file about a run: scores, curves, best and worst images", config.ReportConfig,
        "segtrain.commands.report.write:report_run", "run",
        ("segtrain report runs/toy",
         "segtrain report runs/toy output=toy.html pictures=8",
         "segtrain report run=runs/cityscapes_resnext101 root=/data/cityscapes device=cuda"),
    ),
    "suspects": Command(
        "results", "list labels that the network of a run contradicts most surely", config.SuspectsConfig,
        "segtrain.commands.suspects:suspects", "run",
        ("segtrain suspects runs/toy",
         "segtrain suspects runs/toy split=train top=200 output=to_check",
         "segtrain suspects run=runs/mine root=/data/mine device=cuda"),
    ),
    "submit": Command(
        "results", "write and verify the archive for a benchmark's server", config.SubmitConfig,
        "segtrain.commands.submit:submit", "checkpoint",
        ("segtrain submit checkpoint=runs/cityscapes_resnext101/last.pt dataset=cityscapes",
         "segtrain submit predictions=results dataset=kitti output=to_send",
         "segtrain submit run=runs/vistas_resnet50 dataset=vistas inference=tiled"),
    ),
    "predict": Command(
        "use", "write label, colour, overlay and probability images for photographs", config.PredictConfig,
        "segtrain.commands.predict:predict", "input",
        ("segtrain predict checkpoint=runs/toy/last.pt input=photo.jpg",
         "segtrain predict run=runs/toy input=photos output=answers",
         "segtrain predict checkpoint=wide_resnet38_deeplab_vistas.pth.tar input=photos inference=vistas_official "
         "outputs=[palette,prob]"),
    ),
    "export": Command(
        "use", "write a network for other programs: ONNX, torch.export or plain tensors", config.ExportConfig,
        "segtrain.commands.export:export", "checkpoint",
        ("segtrain export runs/toy/last.pt output=toy.onnx",
         "segtrain export run=runs/toy format=torch_export output=toy.pt2 'size=[256,512]'",
         "segtrain export runs/toy/best.pt format=state_dict output=toy.safetensors 'include=[normalise]'"),
    ),
    "convert": Command(
        "use", "convert weights: rename keys, change container, make a checkpoint", config.ConvertConfig,
        "segtrain.commands.convert:convert", "input",
        ("segtrain convert input=runs/toy/last.pt output=toy.safetensors",
         "segtrain convert input=resnet50-11ad3fa6.pth output=resnet50.safetensors",
         "segtrain convert input=wide_resnet38_deeplab_vistas.pth.tar output=vistas.pt form=run"),
    ),
    "weights": Command(
        "use", "list published weights: source, md5, licence, accuracy", config.WeightsConfig,
        "segtrain.commands.weights:weights", "verify",
        ("segtrain weights", "segtrain weights verify=wide_resnet38_ipabn_lr_256.pth.tar",
         "segtrain weights fetch=torchvision:resnet50"),
    ),
    "info": Command(
        "use", "show driver, torch and kernels of this machine, or a checkpoint's contents", config.InfoConfig,
        "segtrain.commands.info:info", "checkpoint",
        ("segtrain info", "segtrain info checkpoint=runs/toy/last.pt", "segtrain info runs/toy/best.pt"),
    ),
}  # fmt: skip
# What people type who come from elsewhere.
ALIASES = {
    "val": "evaluate",
    "test": "evaluate",
    "eval": "evaluate",
    "infer": "predict",
    "doctor": "check",
    "pretrain": "train",
}
