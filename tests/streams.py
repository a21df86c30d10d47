"""CUDA streams without a GPU."""

from __future__ import annotations

import torch


class Gpu:
    """A stand-in for torch.cuda's streams: keeps what was ordered, in order."""

    def __init__(self, monkeypatch):
        self.log = []
        gpu = self

        class Event:
            def record(self, stream):
                gpu.log.append(("record", stream.name, id(self)))

        class Stream:
            def __init__(self, device=None, name="side"):
                self.device, self.name = device, name

            def wait_event(self, event):
                gpu.log.append(("wait", self.name, id(event)))

            def wait_stream(self, stream):
                pass

            def __enter__(self):
                pass

            def __exit__(self, *_):
                pass

        main = Stream(name="main")
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: main)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
