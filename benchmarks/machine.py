"""What a machine is called: in a record, in the names of files, and in headings."""

import platform
import re
from pathlib import Path

_FIELDS = {"family": "cpu family", "model": "model", "implementer": "CPU implementer", "part": "CPU part"}
_SAID_OF_ALL = {"r", "tm", "cpu", "processor", *_FIELDS}  # words that do not distinguish processors
# what a hypervisor's "AMD EPYC" leaves out
_MICROARCHITECTURES = {
    "(family 25, model 1)": "Zen 3",
    "(family 25, model 17)": "Zen 4",
    "(family 26, model 2)": "Zen 5",
}


def cpu_name():
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    return cpu_name_of(text)


def cpu_name_of(cpuinfo):
    """The name, and the numbers that identify the processor: x86 has family and model, Arm the other two."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    fields = {key.strip(): value.strip() for key, _, value in lines}
    numbers = [f"{name} {fields[key]}" for name, key in _FIELDS.items() if key in fields]
    name = fields.get("model name", platform.machine())
    return f"{name} ({', '.join(numbers)})" if numbers else name


def short_name(record):
    """The part of a file's name that says which machine: a GPU, or a processor and its instruction set.

    Both, as one processor can use several sets, and processors of one set differ in speed.
    """
    if "gpu" in record:
        return gpu_name(record["device"])
    words = re.findall(r"[a-z0-9]+", f"{record['device']} {record['isa']}".lower())
    return "-".join(word for word in words if word not in _SAID_OF_ALL)


def gpu_name(device):
    """A GPU's short name: "NVIDIA H200" is "h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower().removeprefix("nvidia ")).strip("-") or "gpu"


def title(record):
    """The machine of a record, for readers."""
    name = record["device"]
    if "gpu" in record:
        return name
    for numbers, microarchitecture in _MICROARCHITECTURES.items():
        name = name.replace(numbers, f"{numbers[:-1]}, {microarchitecture})")
    return f"{name}, {record['isa']}"
