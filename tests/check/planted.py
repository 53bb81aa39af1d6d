"""Faults to plant in train.py, and what the doctor has to say of each.

A fault is a list of edits: a text that stands in the script once, and what stands in its place. Some faults need a
script that can do more: a feature is such edits, too, and leaves the script clean.
"""

from pathlib import Path
from typing import NamedTuple

BASE = Path(__file__).with_name("train.py")
BACKWARD = "            loss.backward()\n"
STEP = "            optimizer.step()\n"

PIECES = {  # each batch in two pieces, of which the second one exchanges
    f"            loss = nn.functional.cross_entropy(ddp_model(x), y)\n{BACKWARD}": """\
            for piece, (x_piece, y_piece) in enumerate(zip(x.chunk(2), y.chunk(2))):
                with ddp_model.no_sync() if piece == 0 else nullcontext():
                    loss = nn.functional.cross_entropy(ddp_model(x_piece), y_piece)
                    loss.backward()
""",
    "import os\n": "import os\nfrom contextlib import nullcontext\n",
}
SCALER = {
    BACKWARD: "            scaler.scale(loss).backward()\n            scaler.unscale_(optimizer)\n",
    STEP: "            scaler.step(optimizer)\n            scaler.update()\n",
    "    torch.manual_seed(1 + rank)\n": """\
    torch.manual_seed(1 + rank)
    scaler = torch.amp.GradScaler("cpu")
    scaler.load_state_dict(scaler.state_dict() | {"scale": 1024.0})
""",
}
PLATEAU = {
    "lr_scheduler.StepLR(optimizer, 2, 0.5)": "lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)",
    "        scheduler.step()\n        accuracy = validate(model, val_loader)\n": """\
        mean = loss.detach()
        dist.all_reduce(mean)
        scheduler.step(mean / world_size)
        accuracy = validate(model, val_loader)
""",
}
LOAD = {
    "    torch.manual_seed(1 + rank)\n": """\
    torch.manual_seed(1 + rank)
    state = torch.optim.Adam(model.parameters(), lr=0.01).state_dict()
    optimizer.load_state_dict(state)
"""
}
GATHER = {
    "            loss = nn.functional.cross_entropy(ddp_model(x), y)\n": """\
            out = ddp_model(x)
            rows = torch.distributed.nn.functional.all_gather(out)
            loss = nn.functional.cross_entropy(out, y) + 0.01 * (out @ torch.cat(list(rows)).T).square().mean()
""",
    "import torch.distributed as dist\n": "import torch.distributed as dist\nimport torch.distributed.nn.functional\n",
}
STREAM = {
    "    train_loader = DataLoader(train_set, 10, sampler=sampler)\n": """\
    train_loader = DataLoader(Stream(train_set), 10, num_workers=2, multiprocessing_context="fork")
""",
    "class Model": """\
class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        worker = get_worker_info()
        reader, n_readers = rank * worker.num_workers + worker.id, world_size * worker.num_workers
        for index in range(reader, len(self.data), n_readers):
            yield self.data[index]


class Model""",
    "DistributedSampler, random": "DistributedSampler, IterableDataset, get_worker_info, random",
    "self.x[index] + 0.1 * torch.randn(8)": "self.x[index]",
    "range(3)": "range(2)",
}
COUNTS = {
    "        accuracy = validate(model, val_loader)\n": """\
        accuracy = validate(model, val_loader)
        counts = {"cat": 1, "dog": 2} if rank == 0 else {"cat": 5, "dog": 4}
        for kind in sorted(counts):
            total = torch.tensor(counts[kind])
            dist.all_reduce(total)
"""
}
SCORES = {
    "        accuracy = validate(model, val_loader)\n": """\
        accuracy = validate(model, val_loader)
        n_scores = 4
        rows = [torch.zeros(n_scores) for _ in range(world_size)] if rank == 0 else None
        dist.gather(torch.zeros(n_scores), rows)
"""
}
HEADS = {
    "        self.head = nn.Linear(16, 3)\n": """\
        names = ["cat", "dog"]
        self.heads = nn.ModuleDict({name: nn.Linear(16, 3) for name in names})
""",
    "return self.head(self.drop(self.body(x).relu()))": """x = self.drop(self.body(x).relu())
        return sum(head(x) for head in self.heads.values())""",
}
FROZEN = {
    "    ddp_model = Dist": "    model.body.requires_grad_(False)\n    ddp_model = Dist",
    "        sampler.set_epoch(epoch)\n": """\
        sampler.set_epoch(epoch)
        if epoch == 1:
            model.body.requires_grad_(True)
            ddp_model = DistributedDataParallel(model)
""",
}
WORKERS = {
    "train_set, 10, sampler=sampler)": 'train_set, 10, sampler=sampler, num_workers=2, multiprocessing_context="fork")',
    "range(3)": "range(1)",
}
GENERATOR = WORKERS | {
    "self.y = torch.arange(n) % 3": "self.y, self.rng = torch.arange(n) % 3, np.random.default_rng(rank)",
    "0.1 * torch.randn(8)": "torch.from_numpy(self.rng.normal(0, 0.1, 8)).float()",
    "import torch\nimport torch.dist": "import numpy as np\nimport torch\nimport torch.dist",
    ", num_workers=2,": ", num_workers=2, worker_init_fn=reseed,",
    "class Model": """\
def reseed(worker):
    torch.utils.data.get_worker_info().dataset.dataset.rng = np.random.default_rng((rank, worker))


class Model""",
}
AVERAGE = {
    STEP: """\
            optimizer.step()
            if rank == 0:
                average = {name: weight.clone() for name, weight in model.state_dict().items()}
"""
}
GPU = {
    '    dist.init_process_group("gloo")\n': """\
    dist.init_process_group("nccl")
    torch.cuda.set_device(rank)
""",
    "model = Model()": "model = Model().cuda()",
    "DistributedDataParallel(model)\n": "DistributedDataParallel(model, device_ids=[rank])\n",
    "        for _step, (x, y) in enumerate(train_loader):\n": """\
        for _step, (x, y) in enumerate(train_loader):
            x, y = x.to(rank), y.cuda(non_blocking=True)
""",
    "        for x, y in loader:\n": "        for x, y in loader:\n            x, y = x.cuda(), y.cuda()\n",
    "torch.zeros(2)": 'torch.zeros(2, device="cuda")',
}


ONE_VISIBLE = GPU | {  # its own GPU has the number 0 in each process
    "import os\n": 'import os\n\nos.environ["CUDA_VISIBLE_DEVICES"] = os.environ["LOCAL_RANK"]\n',
    '    dist.init_process_group("gloo")\n': '    dist.init_process_group("nccl")\n',
    "DistributedDataParallel(model)\n": "DistributedDataParallel(model, device_ids=[0])\n",
    "        for _step, (x, y) in enumerate(train_loader):\n": """\
        for _step, (x, y) in enumerate(train_loader):
            x, y = x.to(torch.cuda.device_count() - 1), y.cuda(non_blocking=True)
""",
}


class Fault(NamedTuple):
    name: str
    level: str
    rule: str
    at: str | None  # a text of the line that the doctor must name
    edits: dict[str, str]
    feature: dict[str, str] = {}
    flags: tuple[str, ...] = ()


FAULTS = [
    # meeting
    Fault(
        "no_group",
        "BROKEN",
        "a process group is started",
        "DistributedSampler(train_set)",
        {'    dist.init_process_group("gloo")\n': ""},
    ),
    Fault(
        "no_group_no_wrap",
        "BROKEN",
        "a process group is started",
        "optimizer.step()",
        {
            '    dist.init_process_group("gloo")\n': "",
            "DistributedDataParallel(model)\n": "model\n",
            "    dist.all_reduce(sums)\n": "",
            "    dist.destroy_process_group()\n": "",
            "DistributedSampler(train_set)": "DistributedSampler(train_set, world_size, rank)",
        },
    ),
    Fault(
        "groups_of_one",
        "BROKEN",
        "all ranks take part",
        "init_process_group(",
        {'"gloo")': '"gloo", rank=0, world_size=1)'},
    ),
    Fault(
        "one_gpu",
        "BROKEN",
        "each rank has its own GPU",
        ".cuda()",
        {"    torch.cuda.set_device(rank)\n": "", "device_ids=[rank]": "device_ids=[0]", "x.to(rank)": "x.cuda()"},
        GPU,
    ),
    Fault(
        "one_is_visible",
        "BROKEN",
        "each rank has its own GPU",
        ".cuda()",
        {'= os.environ["LOCAL_RANK"]': '= "0"'},
        ONE_VISIBLE,
    ),
    Fault("group_left_open", "NOTE", "the group is left", None, {"    dist.destroy_process_group()\n": ""}),
    # model
    Fault(
        "other_order",
        "BROKEN",
        "one model at the wrap",
        "ddp_model = ",
        {'names = ["cat", "dog"]': 'names = (["cat", "dog"], ["dog", "cat"])[rank]'},
        HEADS,
    ),
    Fault(
        "other_shapes",
        "BROKEN",
        "one model at the wrap",
        "ddp_model = ",
        {"nn.Linear(8, 16)": "nn.Linear(8, 16 + rank)", "nn.Linear(16, 3)": "nn.Linear(16 + rank, 3)"},
    ),
    Fault(
        "own_start",
        "BROKEN",
        "one start",
        "DistributedDataParallel(model, init_sync=False)",
        {
            "DistributedDataParallel(model)\n": "DistributedDataParallel(model, init_sync=False)\n",
            "    torch.manual_seed(0)\n": "    torch.manual_seed(rank)\n",
        },
    ),
    Fault(
        "no_wrap", "BROKEN", "a model is wrapped", "optimizer.step()", {"DistributedDataParallel(model)\n": "model\n"}
    ),
    Fault(
        "past_the_wrap",
        "BROKEN",
        "the wrapped model is what is called",
        "cross_entropy(model(x), y)",
        {"cross_entropy(ddp_model(x), y)": "cross_entropy(model(x), y)"},
    ),
    Fault(
        "unfrozen",
        "BROKEN",
        "nothing is frozen or unfrozen after the wrap",
        "optimizer.step()",
        {"            ddp_model = DistributedDataParallel(model)\n": ""},
        FROZEN,
    ),
    Fault(
        "frozen_later",
        "BROKEN",
        "every weight gets a gradient",
        "ddp_model(x)",
        {"    scheduler = ": "    model.body.requires_grad_(False)\n    scheduler = "},
    ),
    Fault(
        "other_weights",
        "BROKEN",
        "the optimizer steps what is wrapped",
        "optimizer.step()",
        {
            "    optimizer = ": "    own_head = nn.Linear(3, 3)\n    optimizer = ",
            "torch.optim.Adam(model": "torch.optim.Adam(own_head",
            "ddp_model(x)": "own_head(ddp_model(x))",
        },
    ),
    Fault(
        "half_stepped",
        "SUSPECT",
        "the optimizer steps what is wrapped",
        "optimizer.step()",
        {"torch.optim.Adam(model.parameters()": "torch.optim.Adam(model.head.parameters()"},
    ),
    Fault(
        "batch_norm",
        "NOTE",
        "BatchNorm sees its own rank only",
        "ddp_model = ",
        {"self.body = nn.Linear(8, 16)": "self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16))"},
    ),
    Fault(
        "unused_looked_for",
        "NOTE",
        "unused weights are looked for",
        "DistributedDataParallel(model, find",
        {"DistributedDataParallel(model)\n": "DistributedDataParallel(model, find_unused_parameters=True)\n"},
    ),
    # gradients
    Fault(
        "own_noise",
        "BROKEN",
        "gradients are equal",
        "optimizer.step()",
        {BACKWARD: BACKWARD + "            model.head.bias.grad += 1e-3 * torch.randn(3)\n"},
    ),
    Fault(
        "no_gradient",
        "BROKEN",
        "something is learned",
        "optimizer.step()",
        {"cross_entropy(ddp_model(x), y)": "cross_entropy(ddp_model(x)[:, :1], 0 * y)"},
    ),
    Fault(
        "each_piece_exchanges",
        "NOTE",
        "accumulation exchanges once a step",
        "optimizer.step()",
        {"ddp_model.no_sync() if piece == 0 else nullcontext()": "nullcontext()"},
        PIECES,
    ),
    Fault(
        "never_exchanged",
        "BROKEN",
        "the last backward exchanges",
        "loss.backward()",
        {
            "ddp_model.no_sync() if piece == 0 else nullcontext()": "ddp_model.no_sync()",
        },
        PIECES,
    ),
    Fault(
        "clipped_early",
        "BROKEN",
        "gradients are clipped after the exchange",
        "clip_grad_norm_",
        {"            nn.utils.clip": "                nn.utils.clip"},
        PIECES,
    ),
    Fault(
        "cut_off_early",
        "BROKEN",
        "gradients are clipped after the exchange",
        "clip_grad_value_",
        {"            nn.utils.clip_grad_norm_": "                nn.utils.clip_grad_value_"},
        PIECES,
    ),
    Fault(
        "divided_by_pieces_and_ranks",  # of which there are two each
        "BROKEN",
        "the loss is a mean, once",
        "loss.backward()",
        {"ddp_model(x_piece), y_piece)\n": "ddp_model(x_piece), y_piece) / 2 / world_size\n"},
        PIECES,
    ),
    Fault(
        "divided_by_both_at_once",
        "BROKEN",
        "the loss is a mean, once",
        "loss.backward()",
        {"ddp_model(x_piece), y_piece)\n": "ddp_model(x_piece), y_piece) / (2 * world_size)\n"},
        PIECES,
    ),
    Fault(
        "divided_again",
        "BROKEN",
        "the loss is a mean, once",
        "loss.backward()",
        {"cross_entropy(ddp_model(x), y)\n": "cross_entropy(ddp_model(x), y) / world_size\n"},
    ),
    Fault(
        "gathered",
        "BROKEN",
        "gathered tensors keep their gradient",
        "dist.all_gather(",
        {
            "            rows = torch.distributed.nn.functional.all_gather(out)\n": """\
            rows = [torch.empty_like(out) for _ in range(world_size)]
            dist.all_gather(rows, out)
"""
        },
        GATHER,
    ),
    # steps
    Fault(
        "own_average",
        "BROKEN",
        "weights stay equal",
        "optimizer.step()",
        {
            ".items()}\n": ".items()}\n                if _step == 3:\n                    model.load_state_dict("
            "{name: 0.9 * weight for name, weight in average.items()})\n"
        },
        AVERAGE,
    ),
    Fault("own_rate", "BROKEN", "one learning rate", "optimizer.step()", {"lr=0.01": "lr=0.01 * (1 + rank)"}),
    Fault(
        "own_scale",
        "BROKEN",
        "one gradient scale",
        "scaler.step(optimizer)",
        {'"scale": 1024.0': '"scale": 1024.0 * (1 + rank)'},
        SCALER,
    ),
    Fault(
        "own_metric",
        "BROKEN",
        "what a rank decides by is the same",
        "scheduler.step(",
        {"        dist.all_reduce(mean)\n": ""},
        PLATEAU,
    ),
    Fault(
        "one_schedules",
        "BROKEN",
        "all ranks step the schedule",
        "scheduler.step()",
        {"        scheduler.step()\n": "        if rank == 0:\n            scheduler.step()\n"},
    ),
    Fault(
        "one_loads",
        "SUSPECT",
        "all ranks load",
        "optimizer.load_state_dict(state)",
        {"    optimizer.load_state_dict(state)\n": "    if rank == 0:\n        optimizer.load_state_dict(state)\n"},
        LOAD,
    ),
    # samples
    Fault(
        "no_sampler",
        "BROKEN",
        "each rank reads its own samples",
        "train_loader = ",
        {"train_set, 10, sampler=sampler)": "train_set, 10, shuffle=True)"},
    ),
    Fault(
        "one_order",
        "BROKEN",
        "each rank reads its own samples",
        "train_loader = ",
        {"train_set, 10, sampler=sampler)": "train_set, 10, shuffle=True, generator=torch.Generator().manual_seed(0))"},
    ),
    Fault(
        "told_one_rank",
        "BROKEN",
        "each rank reads its own samples",
        "train_loader = ",
        {"DistributedSampler(train_set)": "DistributedSampler(train_set, 1, 0)"},
    ),
    Fault(
        "whole_stream",
        "BROKEN",
        "each rank reads its own samples",
        "train_loader = ",
        {"range(reader, len(self.data), n_readers)": "range(worker.id, len(self.data), worker.num_workers)"},
        STREAM,
    ),
    Fault(
        "stream_in_each_worker",
        "BROKEN",
        "each sample is read once an epoch",
        "train_loader = ",
        {"range(reader, len(self.data), n_readers)": "range(rank, len(self.data), world_size)"},
        STREAM,
    ),
    Fault(
        "no_set_epoch",
        "BROKEN",
        "each epoch has another order",
        "train_loader = ",
        {"        sampler.set_epoch(epoch)\n": ""},
    ),
    Fault(
        "no_shuffle",
        "NOTE",
        "each epoch has another order",
        "train_loader = ",
        {"DistributedSampler(train_set)": "DistributedSampler(train_set, shuffle=False)"},
    ),
    Fault(
        "uneven",
        "BROKEN",
        "ranks have as many batches",
        "train_loader = ",
        {"train_set, 10, sampler=sampler)": "train_set, 10, sampler=range(rank, 120 + 40 * rank, 2))"},
    ),
    Fault(
        "own_split",
        "BROKEN",
        "the data are the same",
        "train_loader = ",
        {", generator=torch.Generator().manual_seed(0))\n    sampler": ")\n    sampler"},
    ),
    Fault(
        "own_split_by_numpy",
        "BROKEN",
        "the data are the same",
        "val_loader = ",
        {
            "train_set, val_set = random_split(data, [160, 41], generator=torch.Generator().manual_seed(0))": """\
order = np.random.default_rng().permutation(201)
    train_set, val_set = Rows(data, order[:160]), Rows(data, order[160:])""",
            "import torch\nimport torch.dist": "import numpy as np\nimport torch\nimport torch.dist",
            "class Model": """\
class Rows(Dataset):
    def __init__(self, data, order):
        self.x, self.y = data.x[order], data.y[order]

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.x[index], self.y[index]


class Model""",
        },
    ),
    Fault(
        "padded",
        "NOTE",
        "validation counts each sample once",
        "val_loader = ",
        {"sampler=range(rank, len(val_set), world_size)": "sampler=DistributedSampler(val_set, shuffle=False)"},
    ),
    Fault("own_share", "SUSPECT", "metrics are of all samples", "val_loader = ", {"    dist.all_reduce(sums)\n": ""}),
    Fault(
        "one_reads_a_share",
        "SUSPECT",
        "metrics are of all samples",
        "val_loader = ",
        {
            "    val_loader = DataLoader(val_set, 10, sampler=range(rank, len(val_set), world_size))\n": """\
    if rank == 0:
        val_loader = DataLoader(val_set, 10, sampler=DistributedSampler(val_set))
""",
            "    dist.all_reduce(sums)\n": "",
            "        accuracy = validate": "        if rank == 0:\n            accuracy = validate",
        },
    ),
    # random numbers
    Fault(
        "one_dropout",
        "BROKEN",
        "ranks drop other units",
        "self.drop(",
        {"torch.manual_seed(1 + rank)": "pass", "self.x[index] + 0.1 * torch.randn(8)": "self.x[index]"},
    ),
    Fault(
        "one_augmentation",
        "BROKEN",
        "ranks augment differently",
        "def __getitem__",
        {"torch.manual_seed(1 + rank)": "pass", "nn.Dropout(0.2)": "nn.Identity()"},
    ),
    Fault(
        "one_augmentation_in_workers",
        "BROKEN",
        "ranks augment differently",
        "def __getitem__",
        {"torch.manual_seed(1 + rank)": "pass", "nn.Dropout(0.2)": "nn.Identity()"},
        WORKERS,
    ),
    Fault(
        "workers_alike",
        "BROKEN",
        "workers augment differently",
        "def __getitem__",
        {"default_rng((rank, worker))": "default_rng(rank)"},
        GENERATOR,
    ),
    # calls
    Fault(
        "other_order_of_names",
        "BROKEN",
        "ranks are at the same step",
        "dist.all_reduce(total)",
        {"sorted(counts)": "sorted(counts, reverse=rank == 1)"},
        COUNTS,
    ),
    Fault(
        "skipped",
        "BROKEN",
        "ranks are at the same step",
        "cross_entropy(",
        {BACKWARD: "            if rank == 1 and _step == 3:\n                continue\n" + BACKWARD},
    ),
    Fault("other_sizes", "BROKEN", "shapes agree", "dist.gather(", {"n_scores = 4": "n_scores = 5 - 2 * rank"}, SCORES),
    Fault(
        "one_validates",
        "BROKEN",
        "the ranks make the same calls",
        "dist.all_reduce(sums)",
        {"        accuracy = validate": "        if rank == 0:\n            accuracy = validate"},
    ),
    Fault(
        "one_waits",
        "BROKEN",
        "the ranks make the same calls",
        "dist.barrier()",
        {
            "        torch.save": "        dist.barrier()\n        torch.save",
            "    dist.destroy_process_group()\n": "    import time\n    time.sleep(rank and 60)\n",
        },
        flags=("--patience", "4"),
    ),
    Fault(
        "stops_early",
        "BROKEN",
        "the ranks make the same calls",
        "dist.all_reduce(sums)",
        {
            "        scheduler.step()\n": """\
        scheduler.step()
        if rank == 1 and epoch == 1:
            break
"""
        },
    ),
    Fault(
        "one_fails",
        "BROKEN",
        "the script runs",
        'raise ValueError("no such file")',
        {
            BACKWARD: '            if rank == 1 and _step == 3:\n                raise ValueError("no such file")\n'
            + BACKWARD
        },
    ),
    # files
    Fault(
        "all_save",
        "BROKEN",
        "one rank writes each file",
        "torch.save(",
        {"        torch.save": "    if True:\n        torch.save"},
    ),
    Fault(
        "all_write",
        "SUSPECT",
        "one rank writes each file",
        'open("log.txt"',
        {"    if rank == 0:\n        print": '    open("log.txt", "w").close()\n    if rank == 0:\n        print'},
    ),
    Fault(
        "module_names",
        "NOTE",
        "checkpoints are of the plain model",
        "torch.save(",
        {"torch.save(model.": "torch.save(ddp_model."},
    ),
    Fault(
        "all_download",
        "SUSPECT",
        "one rank downloads",
        "urlopen(",
        {
            "    data = Noisy(201)\n": "    urllib.request.urlopen('file://' + os.path.abspath(__file__)).close()\n"
            "    data = Noisy(201)\n",
            "import os\n": "import os\nimport urllib.request\n",
        },
    ),
]
FEATURES = {
    "GPU": GPU,
    "ONE_VISIBLE": ONE_VISIBLE,
    "PIECES": PIECES,
    "SCALER": SCALER,
    "PLATEAU": PLATEAU,
    "LOAD": LOAD,
    "GATHER": GATHER,
    "STREAM": STREAM,
    "COUNTS": COUNTS,
    "SCORES": SCORES,
    "HEADS": HEADS,
    "FROZEN": FROZEN,
    "WORKERS": WORKERS,
    "GENERATOR": GENERATOR,
    "AVERAGE": AVERAGE,
}
UNUSUAL = {  # and right all the same: nothing may be called BROKEN or SUSPECT
    "as many pieces as ranks": {old: new.replace("y_piece)\n", "y_piece) / 2\n") for old, new in PIECES.items()},
    "two optimizers": {
        "    optimizer = ": """\
    rival = DistributedDataParallel(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)))
    rival_optimizer = torch.optim.Adam(rival.parameters(), lr=0.01)
    optimizer = """,
        STEP: STEP
        + """\
            rival_optimizer.zero_grad()
            out = ddp_model(x).detach()
            (rival(torch.randn_like(out)).square().mean() + (1 - rival(out)).square().mean()).backward()
            rival_optimizer.step()
""",
    },
    "join": {
        "        for _step, (x, y) in enumerate(train_loader):\n": """\
        with Join([ddp_model]):
         for x, y in train_loader:
""",
        "train_set, 10, sampler=sampler)": "train_set, 10, sampler=range(rank, 120 + 40 * rank, 2))",
        "from torch import nn\n": "from torch import nn\nfrom torch.distributed.algorithms.join import Join\n",
        "            nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n": "",
        "    dist.all_reduce(sums)\n": "",
        "        accuracy = validate(model, val_loader)\n": "    accuracy = 0.0\n",
    },
    "metrics from rank to rank": {
        "    dist.all_reduce(sums)\n": """\
    if rank == 0:
        for other in range(1, world_size):
            theirs = torch.zeros(2)
            dist.recv(theirs, other)
            sums += theirs
    else:
        dist.send(sums, 0)
"""
    },
    "averaged weights": {
        "DistributedDataParallel(model)\n": "model\n",
        STEP: STEP
        + """\
            for weight in model.parameters():
                dist.all_reduce(weight.data)
                weight.data /= world_size
""",
    },
    "gradients by hand": {
        "DistributedDataParallel(model)\n": "model\n",
        BACKWARD: BACKWARD
        + """\
            for weight in model.parameters():
                dist.all_reduce(weight.grad)
                weight.grad /= world_size
""",
    },
    "warm-up": {
        "    for epoch in range(3):\n": """\
    nn.functional.cross_entropy(model(torch.randn(4, 8)), torch.zeros(4, dtype=torch.int64)).backward()
    for epoch in range(3):
"""
    },
    "tied weights": {
        "        self.body = nn.Linear(8, 16)\n": """\
        self.body, self.back, self.again = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 16)
        self.again.weight = self.body.weight
""",
        "self.body(x).relu()": "self.again(self.back(self.body(x).relu())).relu()",
    },
    "a share of the data each": {
        "    sampler = DistributedSampler(train_set)\n": """\
    train_set = torch.utils.data.Subset(train_set, range(rank, len(train_set), world_size))
    sampler = torch.utils.data.RandomSampler(train_set)
""",
        "        sampler.set_epoch(epoch)\n": "",
    },
}
FSDP2 = {
    "DistributedDataParallel(model)\n": "model\n    fully_shard(model)\n",
    "from torch import nn\n": "from torch import nn\nfrom torch.distributed.fsdp import fully_shard\n",
    '        torch.save(model.state_dict(), "model.pt")\n': "",
}


def edited(*edits: dict[str, str], base: str | None = None) -> str:
    """The base script with all edits. Raises `ValueError` for a text that is not there exactly once."""
    text = BASE.read_text() if base is None else base
    for changes in edits:
        for old, new in changes.items():
            if text.count(old) != 1:
                raise ValueError(f"{old!r} is in the script {text.count(old)} times")
            text = text.replace(old, new)
    return text


def line_with(text: str, part: str) -> list[int]:
    """Numbers of the lines that have it; a part with a line break has it at its end."""
    return [i for i, line in enumerate(text.splitlines(keepends=True), 1) if part in line]
