"""Protection: an adapter is kept from acting on given prompts, by algebra (lib/PROTECTION.md).

Some layers see nothing but text: all of the text encoder, and in the UNet the keys and values of the attention to the
text. Let the rows x be what such a layer reads from the base model under the protected prompts, each of length 1, and
C the mean of x x^T. In place of A the adapter computes with

    A P / r      P = (1 + C / (ridge * mean eigenvalue of C))^-1
                 r = max(rms |x P| of the caption, rms |x P| of the prompts / MOST_LEFT)

P takes away the directions that the prompts use and leaves the others. r gives the caption back the size that it had,
so that learning rates mean what they do without P, but gives the prompts no more than MOST_LEFT of theirs: in all
layers but the text encoder's first one the base model's states of the caption hardly differ from those of others, so a
factor would enlarge both. There the adapter learns from what it makes of the caption in the
layers before. By induction over the layers every layer reads under a protected prompt nearly what it reads in the base
model, so C stays right while the adapter is trained.
"""

import torch

from lib import adapters
from lib.errors import UserError
from lib.kernels.lora import without_lora

AT_ONCE = 64  # prompts that are encoded together
KINDS = "listed", "held_out", "concept"  # of prompts that are measured
SHOWN = 200  # at most, of a list
MOST_LEFT = 0.03  # of the norm of the listed prompts' rows, root mean square, in what A reads
SET_APART = 0.5  # times what is left of the caption may be left of a held-out prompt, in the layer that tells them best
STATES = "the UNet's keys and values"  # a reader of text like the text encoder's layers


@torch.no_grad()
def layer_inputs(text_encoder, layers, input_ids):
    """{reader: what it reads, float32 [n, 77, d], each row of length 1} under token ids [n, 77].

    The readers are the names `layers` of linear layers of the text encoder, of several that read the same tensor the
    first, and STATES, which reads the text encoder's output. `readers` says who reads with whom.
    """
    seen = {}
    modules = dict(text_encoder.named_modules())
    hooks = [
        modules[name].register_forward_pre_hook(lambda module, inputs, name=name: seen.update({name: inputs[0]}))
        for name in layers
    ]
    try:
        states = text_encoder(input_ids.to(text_encoder.device))[0]
    finally:
        for hook in hooks:
            hook.remove()
    found, first_of = {}, {}
    for name, tensor in {**seen, STATES: states}.items():
        if first_of.setdefault(id(tensor), name) == name:
            found[name] = torch.nn.functional.normalize(tensor.float(), dim=-1)
    readers = {name: first_of[id(tensor)] for name, tensor in seen.items()}
    return found, readers


class Protection:
    """The projections of a text encoder's adapted `layers` and of the UNet's keys and values, and what they leave.

    `ids` is a function of prompts that gives their token ids, int64 [n, 77]; `prompts` are ProtectedPrompts.
    `projections` is {reader: P / r, float32 [d, d]}, `readers` {layer: its reader}. `left` is {reader: shares}: of the
    norm of a prompt's row P leaves that share where it leaves most, for the captions (their mean), for held-out prompts
    and for listed ones (their 95th percentiles).

    Each of several processes makes its own. These may differ in the last place; the trained weights do not, since the
    gradients are averaged.
    """

    @torch.no_grad()
    def __init__(self, text_encoder, layers, ids, prompts, ridge):
        self.prompts, self.ids, self.captions = prompts, ids, list(prompts.captions)

        def chunks(texts):
            for chunk in ids(texts).split(AT_ONCE):
                yield layer_inputs(text_encoder, layers, chunk)

        sums, rows = {}, 0
        for inputs, self.readers in chunks(prompts.listed):
            rows += inputs[STATES].shape[:2].numel()
            for reader, x in inputs.items():
                x = x.flatten(0, 1).double()
                sums[reader] = sums.get(reader, 0) + x.T @ x
        moments = {reader: total / rows for reader, total in sums.items()}
        projected = {reader: projection_of(moment, ridge) for reader, moment in moments.items()}

        def left(texts):
            """{reader: |x P| of each row, float64 [texts, 77]}"""
            parts = [
                {reader: (x.double() @ projected[reader]).norm(dim=-1) for reader, x in inputs.items()}
                for inputs, _ in chunks(texts)
            ]
            return {reader: torch.cat([part[reader] for part in parts]) for reader in projected}

        caption, held, listed = map(left, (self.captions, self.sample("held_out"), self.sample("listed")))
        self.projections, self.left = {}, {}
        for reader, p in projected.items():
            most = [norms[reader].amax(1) for norms in (caption, held, listed)]
            self.left[reader] = most[0].mean().item(), *(x.quantile(0.95).item() for x in most[1:])
            of_listed = (p @ moments[reader] @ p).trace()  # the mean of |x P|^2
            scale = torch.maximum(caption[reader].square().mean(), of_listed / MOST_LEFT**2).sqrt()
            self.projections[reader] = (p / scale).float()
        self.states = {}
        if not layers:  # the text encoder stays as it is and is not kept
            self.states = {
                kind: [text_encoder(c.to(text_encoder.device))[0].cpu() for c in ids(self.sample(kind)).split(AT_ONCE)]
                for kind in KINDS
            }

    def sample(self, kind):
        """The prompts of one of KINDS that are measured: of the list evenly spread ones, of the captions all."""
        if kind == "concept":
            return self.captions
        prompts = getattr(self.prompts, kind)
        return prompts[:: max(1, len(prompts) // SHOWN)][:SHOWN]

    def of(self, layers):
        """{layer: its projection} of the text encoder's `layers`, or of any layers of the UNet that read the text."""
        return {name: self.projections[self.readers.get(name, STATES)] for name in layers}

    def check(self):
        """UserError unless P leaves clearly less of held-out prompts than of the caption in some layer."""
        best = min(held / taught for taught, held, _ in self.left.values())
        if best > SET_APART:
            raise UserError(
                f"the protected prompts do not set the concept apart: of prompts like them that were held out P leaves {best:.2f} "
                f"times as much as of “{self.captions[0]}”, in the layer where the two differ most, and {SET_APART} is the "
                f"most. {self.prompts.path} has too few prompts ({len(self.prompts.listed)}), too few of the same kind of "
                "thing, or some that say what the caption says; prompts/protected.txt is a list"
            )

    def table(self):
        """What P leaves, layer by layer, as text."""
        head = f"{'what P leaves, of the norm':34}{'caption':>9}{'held out':>10}{'listed':>9}\n"
        return head + "\n".join(
            f"{reader:34}{taught:9.4f}{held:10.4f}{listed:9.4f}" for reader, (taught, held, listed) in self.left.items()
        )

    @torch.no_grad()
    def differences(self, trained):
        """How much the finished adapter changes of what the UNet reads: {kind: dict(text_states, keys_values)}.

        `trained` are {component: LoraParameters}, which from here on compute with the values of the file, rounded to
        half precision as other programs read them. Each figure is the largest |after - before| / |before| of its
        prompts, norms over all positions; that of keys and values is also the largest of all layers.
        """
        for part in trained.values():
            part.compute_with(part.saved().half())
        unet, found = trained["unet"].model, {}
        encoder = trained["text_encoder"].model if "text_encoder" in trained else None
        layers = adapters.lora_layers(unet)
        for kind in KINDS:
            worst = dict(text_states=0.0, keys_values=0.0)
            for number, ids in enumerate(self.ids(self.sample(kind)).split(AT_ONCE)):
                if encoder is None:
                    before = after = self.states[kind][number].to(unet.device).float()
                else:
                    ids = ids.to(encoder.device)
                    with without_lora(encoder):
                        before = encoder(ids)[0].float()
                    after = encoder(ids)[0].float()
                worst["text_states"] = max(worst["text_states"], relative(after, before))
                for layer in layers.values():
                    weight = layer.get_base_layer().weight.float()
                    a, b = (getattr(layer, f"lora_{x}")["default"].weight.half().float() for x in "AB")
                    adapted = after @ weight.T + layer.scaling["default"] * (after @ a.T) @ b.T
                    worst["keys_values"] = max(worst["keys_values"], relative(adapted, before @ weight.T))
            found[kind] = {key: float(f"{value:.3g}") for key, value in worst.items()}
        return found

    def record(self, trained):
        """What config.json says of it."""
        prompts = self.prompts
        return dict(
            noun=prompts.noun,
            listed=len(prompts.listed),
            held_out=len(prompts.held_out),
            left_out=prompts.left_out,
            sha256=prompts.sha256,
            left={reader: list(shares) for reader, shares in self.left.items()},
            differences=self.differences(trained),
        )


def relative(after, before):
    """The largest |after - before| / |before| of prompts [n, 77, d]: a float."""
    return ((after - before).norm(dim=(1, 2)) / before.norm(dim=(1, 2))).max().item()


def projection_of(moments, ridge):
    """P, float64 [d, d], of C, the mean of x x^T over what is protected; on the device of C.

    (1 + C / s)^-1 with s = ridge * mean eigenvalue has C's eigenvectors, and the eigenvalues 1 / (1 + v / s).
    """
    scale = ridge * moments.diagonal().mean()
    system = torch.eye(len(moments), dtype=torch.float64) + (moments / scale).cpu()
    return torch.cholesky_inverse(torch.linalg.cholesky(system)).to(moments.device)


def differences_text(differences):
    """One line of `Protection.differences`."""
    listed, others, concept = (f"{differences[kind]['keys_values']:.1%}" for kind in ("listed", "held_out", "concept"))
    return (
        f"keys and values change by at most: listed prompts {listed}, others like them {others}, the concept {concept}"
    )
