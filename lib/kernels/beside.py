"""A second stream of the GPU: the text encoder and the keys and values of the text beside a UNet's first blocks.

At batch 1 these are some two hundred kernels over 77 rows, each of which leaves nearly all of the GPU idle, and
before its first attention to the text a UNet has other work. Their backward passes run on the stream
of the forward pass (autograd sees to that), so the text encoder's runs beside the UNet's last gradients.
"""

import torch


class Beside:
    """`with` this, what is launched goes to a second stream of `device`, behind all that the current one has so far;
    `join` lets the current one wait for it. On devices without streams both do nothing.

    What is made inside may be used after `join` alone.
    """

    def __init__(self, device):
        self.device = torch.device(device)
        self.stream, self.inside = None, []

    def __enter__(self):
        if self.device.type != "cuda":
            return
        if self.stream is None:
            self.stream = torch.cuda.Stream(self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        self.inside.append(torch.cuda.stream(self.stream))
        self.inside[-1].__enter__()

    def __exit__(self, *problem):
        if self.inside:
            self.inside.pop().__exit__(*problem)

    def join(self):
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)


class Joined(dict):
    """A dictionary of what was made in a Beside: `join` comes before the first of it is read."""

    def __init__(self, values, beside):
        super().__init__(values)
        self.beside = beside

    def __getitem__(self, key):
        if self.beside is not None:
            self.beside.join()
            self.beside = None
        return super().__getitem__(key)
