"""What the Python tests share: counting, comparing tensors, and running the programs."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "dev"))


class Checks:
    """Counts what passed and what failed, and how much was compared."""

    def __init__(self, name):
        self.name = name
        self.passed = self.failed = self.tensors = self.bytes = 0

    def check(self, what, good, detail=""):
        """One check. Returns whether it was good."""
        self.passed, self.failed = self.passed + bool(good), self.failed + (not good)
        if not good:
            print(f"FAIL {what}{': ' if detail else ''}{detail}", flush=True)
        return bool(good)

    def compare(self, what, ours, want, tolerance):
        """Dicts of arrays: the same names, shapes and, within the tolerance, numbers. An error is RMS(ours - want) /
        RMS(want); the RMS of a tensor that is nearly zero as a whole counts as a thousandth of that of all. Prints the
        worst error and returns it."""
        self.check(f"{what}: names", ours.keys() == want.keys(), f"{sorted(ours.keys() ^ want.keys())[:4]}")
        names = sorted(ours.keys() & want.keys())
        pairs = {name: (array(ours[name]), array(want[name])) for name in names}
        squares = sum(float(np.square(b).sum()) for _, b in pairs.values())
        floor = 1e-3 * (squares / max(1, sum(b.size for _, b in pairs.values()))) ** 0.5
        worst, at = 0.0, "-"
        for name, (a, b) in pairs.items():
            self.tensors, self.bytes = self.tensors + 1, self.bytes + array_bytes(want[name])
            if not self.check(f"{what}: {name}", a.shape == b.shape, f"shape {a.shape}, expected {b.shape}"):
                continue
            scale = max(float(np.sqrt(np.square(b).mean())) if b.size else 0.0, floor)
            error = float(np.sqrt(np.square(a - b).mean())) if b.size else 0.0
            error = 0.0 if error == 0 else error / scale if scale > 0 else np.inf
            self.check(f"{what}: {name}", error <= tolerance, f"relative RMS {error:.1e}, allowed {tolerance:.0e}")
            if not error <= worst:                       # a NaN is the worst
                worst, at = error, name
        print(f"{what}: {len(names)} tensors, worst {worst:.1e} of {tolerance:.0e} ({at})", flush=True)
        return worst

    def same_bits(self, what, ours, want):
        """Dicts of arrays that are equal in names, types and every bit."""
        self.check(f"{what}: names", ours.keys() == want.keys(), f"{sorted(ours.keys() ^ want.keys())[:4]}")
        for name in sorted(ours.keys() & want.keys()):
            a, b = ours[name], want[name]
            self.tensors, self.bytes = self.tensors + 1, self.bytes + array_bytes(b)
            same = a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)
            self.check(f"{what}: {name}", same, f"{a.dtype}{tuple(a.shape)} and {b.dtype}{tuple(b.shape)} differ")
        print(f"{what}: {len(want)} tensors, every bit", flush=True)

    def finish(self):
        print(f"{self.name}: {self.passed} passed, {self.failed} failed; {self.tensors:,} tensors, {self.bytes:,} bytes "
              "compared")
        sys.exit(1 if self.failed else 0)


def array(value):
    """A tensor of any of the libraries as a numpy array of doubles."""
    if hasattr(value, "detach"):
        value = value.detach().double().cpu().numpy()
    return np.asarray(value, dtype=np.float64)


def raw(value):
    if hasattr(value, "detach"):
        value = value.detach().contiguous().view(-1).view(dtype=sys.modules["torch"].uint8).numpy()
    return np.asarray(value).tobytes()


def array_bytes(value):
    return value.nbytes if hasattr(value, "nbytes") else np.asarray(value).nbytes


class Programs:
    """The programs of a folder. They share the machine with others: their threads wait asleep."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def run(self, name, *args):
        """Runs a program that has to succeed, from the top folder; returns what it wrote to stdout, in bytes."""
        done = self.attempt([self.folder / name, *args])
        if done.returncode:
            sys.exit(f"{name} {' '.join(map(str, args))}: status {done.returncode}\n{done.stderr.decode()}")
        return done.stdout

    @staticmethod
    def attempt(command):
        """Runs a command from the top folder; the caller looks at its status."""
        return subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, stdin=subprocess.DEVNULL,
                              env={"OMP_WAIT_POLICY": "passive", **os.environ})
