"""Protection: a projection keeps an adapter from acting on listed prompts (lib/PROTECTION.md).

    A is replaced by A P / r      C = mean of x x^T
                                  P = (1 + C / (ridge * mean eigenvalue of C))^-1
                                  r = max(rms |x P| of the caption, rms |x P| of the prompts / MOST_LEFT)

x are the input rows of a layer in the base model under the protected prompts, normalized to length 1. Only layers that
read text alone are adapted: the text encoder's, and the keys and values of the UNet's cross-attention.

P removes the directions that the prompts use and keeps the others. r restores the norm of the caption, so that learning
rates mean the same as without P, but leaves the prompts at most MOST_LEFT of theirs: after the text encoder's first
layer, the base model's states of the caption hardly differ from those of other prompts, and a factor would amplify
both. Those layers learn from the caption as the adapted layers before them change it. By induction over the layers,
every layer reads nearly the base model's input under a protected prompt, so C remains valid during training.
"""

import torch

from lib import adapters
from lib.errors import UserError
from lib.kernels.lora import without_lora

AT_ONCE = 64  # prompts encoded together
KINDS = "listed", "held_out", "concept"  # of measured prompts
MEASURED = 200  # prompts of a list, at most
MOST_LEFT = 0.03  # of the root mean square norm of the listed prompts' rows
SET_APART = 0.5  # largest ratio of what P leaves of held-out prompts to the caption, in the layer that separates best
STATES = "the UNet's keys and values"  # one reader in addition to the text encoder's layers


@torch.no_grad()
def layer_inputs(text_encoder, layers, input_ids):
    """({reader: its input, float32 [n, 77, d] with rows of length 1}, {layer: its reader}) under token ids [n, 77].

    A reader is the first of those of `layers`, linear layers of the text encoder, that read the same tensor, or STATES,
    which reads the text encoder's output.
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
    inputs_of, first_of = {}, {}
    for name, tensor in {**seen, STATES: states}.items():
        if first_of.setdefault(id(tensor), name) == name:
            inputs_of[name] = torch.nn.functional.normalize(tensor.float(), dim=-1)
    readers = {name: first_of[id(tensor)] for name, tensor in seen.items()}
    return inputs_of, readers


class Protection:
    """The projections of a text encoder's adapted `layers` and of the UNet's keys and values.

    `ids` is a function from prompts to token ids, int64 [n, 77]; `prompts` are ProtectedPrompts. `projections` is
    {reader: P / r, float32 [d, d]}, `readers` {layer: its reader}. `left` is {reader: (caption, held out, listed)}: the
    share of the norm that P leaves, in the row of a prompt where it leaves most. It is the mean over the captions and
    the 95th percentile over the prompts.

    Every process computes its own. They may differ in the last digit, but the trained weights do not, because the
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
        if not layers:  # the text encoder is not adapted and will be freed
            self.states = {
                kind: [text_encoder(c.to(text_encoder.device))[0].cpu() for c in ids(self.sample(kind)).split(AT_ONCE)]
                for kind in KINDS
            }

    def sample(self, kind):
        """The measured prompts of one of KINDS: all captions, or an even selection of the list."""
        if kind == "concept":
            return self.captions
        prompts = getattr(self.prompts, kind)
        return prompts[:: max(1, len(prompts) // MEASURED)][:MEASURED]

    def of(self, layers):
        """{layer: its projection} of `layers` of the text encoder, or of the UNet's that read the text."""
        return {name: self.projections[self.readers.get(name, STATES)] for name in layers}

    def check(self):
        """Raises UserError unless in some layer P leaves clearly less of held-out prompts than of the caption."""
        best = min(held / caption for caption, held, _ in self.left.values())
        if best > SET_APART:
            raise UserError(
                f"the protected prompts do not set the concept apart: the projection leaves {best:.2f} times as much of "
                f"held-out prompts as of “{self.captions[0]}” even in the best layer; the limit is {SET_APART}. "
                f"{self.prompts.path} has too few prompts ({len(self.prompts.listed)}), too few about the same kind of "
                "thing, or some that describe the concept; prompts/protected.txt is an example"
            )

    def table(self):
        """`left` as a table for the console."""
        head = f"{'what P leaves, of the norm':34}{'caption':>9}{'held out':>10}{'listed':>9}\n"
        return head + "\n".join(
            f"{reader:34}{caption:9.4f}{held:10.4f}{listed:9.4f}"
            for reader, (caption, held, listed) in self.left.items()
        )

    @torch.no_grad()
    def differences(self, trained):
        """The largest changes in what the UNet reads from a prompt: {kind: dict(text_states, keys_values)}.

        Each is the maximum of |after - before| / |before| over the prompts, with norms over all positions. For keys and
        values it is also the maximum over the layers. `trained`, {component: LoraParameters}, afterwards computes with
        the values of the file, rounded to half precision as other programs read them.
        """
        for part in trained.values():
            part.compute_with(part.saved().half())
        unet, largest = trained["unet"].model, {}
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
            largest[kind] = {key: float(f"{value:.3g}") for key, value in worst.items()}
        return largest

    def record(self, trained):
        """The entry of config.json."""
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
    """The maximum of |after - before| / |before| over prompts [n, 77, d]: a float."""
    return ((after - before).norm(dim=(1, 2)) / before.norm(dim=(1, 2))).max().item()


def projection_of(moments, ridge):
    """P = (1 + C / s)^-1, s = ridge * mean eigenvalue of C: float64 [d, d] on the device of C.

    C is `moments`. P has C's eigenvectors, with the eigenvalues 1 / (1 + v / s).
    """
    scale = ridge * moments.diagonal().mean()
    system = torch.eye(len(moments), dtype=torch.float64) + (moments / scale).cpu()
    return torch.cholesky_inverse(torch.linalg.cholesky(system)).to(moments.device)


def differences_text(differences):
    """`Protection.differences` as a line."""
    listed, others, concept = (f"{differences[kind]['keys_values']:.1%}" for kind in KINDS)
    return (
        f"keys and values change by at most: listed prompts {listed}, others like them {others}, the concept {concept}"
    )
