"""What `--help` prints: a title, what there is to do, and the keys that matter first.

It is text, so that it needs no import; that every key in it exists is a test. `--help-all` prints all keys.
"""

from collections.abc import Sequence

TITLE = "Fine-tune a pretrained vision backbone on your images with SNELL, sparse tuning with kernelized LoRA."
PROGRAM = "python -m snell_lightning"
COMMANDS = {
    "fit": "Tune a backbone; leaves an adapter file, checkpoints and curves in runs/version_N.",
    "validate": "Score a tuned model on the validation images.",
    "test": "Score a tuned model on the test images.",
    "predict": "Write each image's classes and their probabilities to a table.",
    "merge": "Write the tuned model as a plain one, for timm, ONNX or torch.export.",
    "memory": "Plan the memory of a training step without running one.",
    "check-data": "Look at every image: what is missing, unreadable, there twice or odd.",
}
_CONFIG = {
    "--config FILE": "a job or an overlay, shipped or yours; several are merged left to right",
}
_DATA = {
    "--data.root FOLDER": "your images, as FOLDER/CLASS/IMAGE or FOLDER/{train,val,test}/CLASS/IMAGE",
    "--data.batch_size N": "images per step and process",
}
_MODEL = {
    "--model.backbone NAME": "any timm model, hf-hub:ORG/NAME or local-dir:PATH",
    "--model.weights PATH": "its weights from a file that you have, as others released it",
    "--data.image_size N": "pixels per side, if not the backbone's own",
    "--data.augmentation HOW": "crop (also flips), light or none",
    "--model.adapter.rank N": "columns of the trained factors",
    "--model.adapter.sparsity F": "fraction of each update that is zero",
    "--model.adapter.recompute HOW": "none, inputs or blocks: less memory for more time",
    "--model.optimizer.lr F": "learning rate",
}
_TUNED = {
    "--config RUN/config.yaml": "a run, with its own adapter, or a job and one of the next two",
    "--model.adapter_file FILE": "an adapter; its backbone, classes, sizes and normalisation hold",
    "--ckpt_path FILE": "a checkpoint",
    "--data.root FOLDER": "the images, if not the run's own",
    "--data.eval_split SPLIT": "test, val, train or all",
    "--data.on_bad_image HOW": "error, or skip what cannot be read",
    "--data.eval_batch_size N": "images per batch and process",
}
_TRAINER = {
    "--trainer.devices N": "processes, one per GPU; auto takes all",
    "--trainer.precision KIND": "32-true, bf16-mixed, 16-mixed",
}
_MERGE = {
    "--adapter FILE": "an adapter",
    "--output DIR": "the folder to make",
    "--format KIND": "timm, onnx or torch_export; timm",
    "--precision KIND": "float32, bfloat16 or float16, where that does not lose the update; float32",
    "--images PATH ...": "images on which to compare it with the tuned model, if not two photographs",
    "--weights PATH": "the backbone's weights, if not where they were in training",
}
_IMAGES = {
    "--adapter FILE": "an adapter; several of one backbone may be named, each with --adapter",
    "--images PATH ...": "folders with all below them, files, and patterns",
    "--output FILE": "a table: .csv, .jsonl or .parquet; what is in it already is not done again",
    "--top_k N": "classes to name for each image; 5",
    "--embeddings": "write pooled features in place of classes",
    "--on_bad_image HOW": "skip (write why it could not be read) or error",
    "--batch_size N": "images at once; 64",
    "--num_workers N": "processes that read images for each device",
    "--devices N": "devices, each with a process of its own",
    "--precision KIND": "32-true, bf16-mixed, 16-mixed",
    "--weights PATH": "the backbone's weights, if not where they were in training",
}
KEYS = {
    "fit": {
        **_CONFIG,
        **_DATA,
        **_MODEL,
        "--trainer.max_epochs N": "passes over the training images",
        **_TRAINER,
        "--resume auto": "go on with the newest unfinished run, if there is one; or --resume RUN",
        "--ckpt_path FILE": "a checkpoint to go on from in a new run",
    },
    "validate": {name: text for name, text in {**_TUNED, **_TRAINER}.items() if "eval_split" not in name},
    "test": {**_TUNED, **_TRAINER},
    "predict": {**_TUNED, **_TRAINER},
    "memory": {
        **_CONFIG,
        "--budget SIZE": "prints the largest batch that fits, such as 8GiB, and what would help most",
        **_MODEL,
        "--data.batch_size N": "images per step and process",
        "--trainer.precision KIND": "32-true, bf16-mixed, 16-mixed",
    },
    "check-data": {
        **_CONFIG,
        "--data.root FOLDER": _DATA["--data.root FOLDER"],
        "--data.source NAME": "folder, table, webdataset, datasets:NAME, torchvision:NAME, vtab, fgvc, few_shot",
        "--output FILE": "writes all of it as JSON too",
        "--workers N": "processes that read images, if not one for each processor",
    },
}


def help_for(arguments: Sequence[str]) -> str | None:
    """The help that a command line asks for, if it does."""
    return _help(arguments[0]) if {"-h", "--help"}.intersection(arguments) else None


def _help(command: str) -> str:
    if command not in COMMANDS:
        example = f"{PROGRAM} fit --config vit.yaml"
        about = f"commands, each with a --help of its own\n{_table(COMMANDS)}\n\nto start: {example}"
        return f"{TITLE}\n\nusage: {PROGRAM} COMMAND --config FILE [--KEY VALUE ...]\n\n{about}"
    if command == "merge":
        usage = f"usage: {PROGRAM} merge --adapter FILE --output DIR"
        return f"{TITLE}\n\n{COMMANDS[command]}\n\n{usage}\n\n{_table(_MERGE)}"
    usage = f"usage: {PROGRAM} {command} --config FILE [--config FILE ...] [--KEY VALUE ...]"
    if command == "predict":
        own = f"usage: {PROGRAM} predict --adapter FILE --images PATH ... --output FILE"
        usage = f"{own}\n\n{_table(_IMAGES)}\n\nor, with the images that a config names, into the run's folder\n{usage}"
    keys = f"keys that matter first (in a config, --data.root is root: under data:)\n{_table(KEYS[command])}"
    return f"{TITLE}\n\n{COMMANDS[command]}\n\n{usage}\n\n{keys}\n\nall keys: {PROGRAM} {command} --help-all"


def _table(rows: dict[str, str]) -> str:
    width = max(map(len, rows)) + 2
    return "\n".join(f"  {name:<{width}}{text}" for name, text in rows.items())
