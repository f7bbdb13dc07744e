"""The commands that README and docs tell, and what stands here for their dots, names, servers and large numbers."""

import re
import shlex

from tests.e2e.loopback import free_port
from tests.e2e.test_commands import ROOT

FIRST = [ROOT / name for name in ("README.md", "RESULTS.md", "docs/protocol.md")]  # whose runs others go on with
PAGES = [*FIRST, *sorted(set((ROOT / "docs").glob("*.md")) - set(FIRST))]
COMMAND = re.compile(
    r"chestct [a-z]+\b(?![|.])|python (train|evaluate|serve)\.py|python -c 'import chestct|(torchrun|srun) .*train\.py"
)
CODE = re.compile(r"^( *)```\w*\n(.*?)^\1```", re.M | re.S)

NOT_RUN = {
    r"^srun ": "SLURM starts it, on two machines; test_ddp has its variables",
    r"^chestct (predict|space)$": "no command, named in passing",
}
"""What is not run, and why."""

ANSWERED = {
    r"launcher=slurm": ("a SLURM cluster, and its plugin, which is not in [dev]", r"chestct\[slurm\]"),
    r"launcher=ray": ("a Ray cluster, and its plugin, which is not in [dev]", "pip install hydra-ray-launcher"),
    r'devices="0,2"': ("three GPUs", "CPUAccelerator|requested gpu"),
    r"ckpt=runs/finetuned": ("a GPU", "Without a GPU"),
    r"format=openvino_int8|backend=openvino_int8": (
        "more slices, if rounding moves two of 24; a processor with bfloat16",
        "refused|torch alone|has no instructions for bfloat16",
    ),
    r"=imagenet1k_v1$": ("the public network, which is cut off here", "imagenet1k_v1"),
    r"TensorBoardLogger": ("TensorBoard, which is not in [dev]", "tensorboard"),
    r"data fetch \w+ ": ("the collection itself; test_public has the whole ones", "is not "),
}
"""What needs something that is not here, and a pattern of the sentence that says so, where it ends with one."""

OTHERS = {
    "aws gcloud az": "an account, and a Docker engine",
    "docker": "a Docker engine; the job `images` of the workflow",
    "dvc git": "a repository: test_story, test_dvc",
    "make pip": "the repository and the network: .ci/run",
    "curl mlflow hf": "a service, a server or the hub: serving/test_api, test_hub",
    "sbatch": "SLURM; what it wraps is run",
    "cd cp export printf .": "the shell's",
}
"""The other programs in blocks of commands: what they need, and what runs them."""

ALL = "data=hospitals 'data.sources.phantom={weight: 0.1}' data.size=32 data.phantom.slices=60 data.phantom.size=96"
"""The data that the bundle of runs/all is made with."""

FILLED = {
    r"export ckpt=last bundle=FOLDER": "export ckpt=runs/all bundle=runs/quick",
    r"export bundle=FOLDER (format=\S+openvino) .*": rf"export bundle=runs/all/bundle \1 {ALL}",
    r"export bundle=FOLDER (format=\S+onnx) .*": rf"export bundle=runs/quick \1 {ALL}",
    r"bundle=FOLDER data=\.\.\. serve": "bundle=runs/quick data=chest_ct data.root=FOLDER serve",
    r"bundle=(FOLDER|\.\.\.)": "bundle=runs/A/bundle",
    r"ckpt=\.\.\.": "ckpt=runs/A",
    r"ckpt=runs/bundle\S*": "ckpt=runs/row",
    r"ckpt=last (.evaluation.protocol)": r"ckpt=runs/row \1",  # whose head trains in a second
    r"ckpt=last (.trust)": r"ckpt=runs/narrow \1",
    r"iq_oth FOLDER": "iq_oth FOLDER --out new",
    r"(predict|embed|packaged data.root=)( ?)FOLDER": r"\1\2FOLDER/valid",  # a second a slice
    r"\.\./shared/data/chest-ct": "chest-ct",
    r"data\.size=256": "data.size=32",
    r"seeds=3": "seeds=2",
    r"workers=8": "workers=2",
    r"sweeper\.jobs=4": "sweeper.jobs=2",
    r"/data/monitor": "monitor",
    r"/shared/": "shared/",
    r"(--viewer|space) FOLDER": r"\1 new\1",
    r"data\.root=\.\.\.": "data.root=FOLDER",
    r"data=\.\.\.": "data=chest_ct",
    r"\{\.\.\.\}": "{healthy: normal, tumour: cancer}",
    r"\bROW\b": "block5_standard",
    r"USER/NAME": "ada/chest",
    r"host=0\.0\.0\.0": "host=127.0.0.2",  # not the network of who runs the tests
    r"trainer=gpu": "trainer=gpu trainer.accelerator=cpu trainer.precision=32-true",
    r"trials=24": "trials=3",
    r"n?proc_per_node 4": "nproc_per_node 1",
    r"tracking=dagshub .*REPO|tracking\.uri=https?://[\w.:]+|(?<=chestct sync)$": " tracking.uri=SERVER",
    r"\$SCRATCH/": "",
    r" > .*|\"$": "",
}
"""What stands for dots, variables, names, servers and large numbers; files and folders of the names are there."""

EXTRA = {
    r"^python train\.py$": "hydra.run.dir=runs/A evaluation.report=true",
    r"^python train\.py model\.freeze=true optim\.lr=1e-4$": "hydra.run.dir=runs/B evaluation.report=true",
    r"experiment=two_stage": "trainer.unfreeze_epoch=1",
    r"places_finetuned": "trainer.unfreeze_epoch=1 trainer.max_epochs=2",
    r"tracking\.(uri|register)|train.*tracking=dagshub": "tracking=mlflow evaluation.report=true",
    r"\bROW\b|debug=": "data.views=0",  # as their files say
    r"^python train\.py data=hospitals experiment=places 'data": "hydra.run.dir=runs/all evaluation.report=true",
    r"RUN_ID": "data.phantom.slices=60 data.phantom.size=96",
    r"mine\.Narrow": "hydra.run.dir=runs/narrow",
    r"-m .*sweep=": "trainer.max_epochs=1 hydra.sweeper.trials=2",
    r"launcher=joblib": "hydra.sweeper.trials=3",
    r"^python train\.py -m optim\.lr=1e-3,1e-4 model": "trainer.max_epochs=1",
}
"""Settings that are given besides, where a command does not give them."""

QUICK = ["data.size=32", "data.batch_size=8", "data.views=1", "data.phantom.slices=60", "data.phantom.size=96"]
QUICK += ["tracking=off", "trainer.max_epochs=2", "trainer.progress=false", "evaluation.resamples=100"]
QUICK += ["evaluation.report=false"]


def programs() -> set[str]:
    """The first word of each line of the blocks of commands, and of what stands behind && or a dollar."""
    found = set()
    for page in PAGES:
        text = re.sub(r" *\\\n\s*", " ", page.read_text(encoding="utf-8"))
        for language, block in re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.M | re.S):
            if language in ("", "bash", "console"):
                lines = [re.sub(r"^\s*(\$ |PYTHONPATH=\. )?", "", line) for line in block.splitlines()]
                lines = [line for line in lines if f"$ {line}" in block] if language == "console" else lines
                parts = [part.split() for line in lines for part in re.split(r"\s#|^#", line)[0].split("&&")]
                found |= {words[0] for words in parts if words}
    return found


def documented() -> list[str]:
    """The commands in blocks and in running text, as they are typed, each once."""
    found = []
    for page in PAGES:
        text = re.sub(r" *\\\n\s*", " ", page.read_text(encoding="utf-8"))
        prose = CODE.sub("", text)
        lines = [line for _, block in CODE.findall(text) for line in block.splitlines()]
        lines += [line for line in prose.splitlines() if line.startswith("    ")]
        lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
        for part in (part for line in lines for part in re.split(r"&&|\|\|", re.split(r"\s{2,}|\s#", line.strip())[0])):
            if command := COMMAND.search(part):
                typed = part[command.start() :].strip()
                found += [typed.replace("$backend", value) for value in ("torch", "openvino_int8")]
    return list(dict.fromkeys(found))


def filled(command: str) -> list[str]:
    """The words of a command that can be run: python or chestct, the subcommand, its arguments."""
    for pattern, value in FILLED.items():
        command = re.sub(pattern, value, command)
    words = shlex.split(re.sub(r"^srun .*(?=train\.py)|^python (?=\w+\.py)", "", command))
    return ["chestct", words[0].removesuffix(".py"), *words[1:]] if words[0].endswith(".py") else words


def quick(command: str, server: str) -> list[str]:
    """The same on small data, for few epochs, where it does not say otherwise, and with a server of ours."""
    here = {"SERVER": server, "HOST:29500": f"127.0.0.1:{free_port()}"}
    words = [re.sub("|".join(here), lambda name: here[name[0]], word) for word in filled(command)]
    given = {word.split("=")[0] for word in words}
    trains = words[0] == "torchrun" or words[1] in ("train", "audit", "ingest")
    wanted = QUICK if trains and "--cfg" not in words else []
    if words[1] == "evaluate" and "compare" not in given:
        wanted = ["evaluation.resamples=100", "trainer.progress=false"]
    if words[1] == "serve":
        wanted = [f"serve.port={free_port()}"]
    for pattern, settings in EXTRA.items():
        if re.search(pattern, command):
            wanted = [*shlex.split(settings), *wanted]
    kept = {item.split("=")[0]: item for item in reversed(wanted)}
    return [*words, *(item for key, item in kept.items() if key not in given)]
