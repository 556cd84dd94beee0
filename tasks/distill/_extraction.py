"""Parts of an extraction: a victim that only answers and counts, generators, a store of what was answered, and whom to ask about next."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.core import loop, networks
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.distill._shared import Images, frozen

Told = Literal["labels", "probabilities"]
LEAST = 1e-6  # of a probability that is nothing, for its logarithm
NEVER = -1e3  # logit of a class that the victim was never heard to say


class Victim:
    """A network as one sees it from outside: images in, labels or probabilities out, each image counted, none beyond the budget."""

    def __init__(self, net: Net, budget: int, answers: Told = "labels", device: str = "cpu") -> None:
        self._net, self._device = frozen(net, device), device
        self.budget, self.answers = budget, answers
        self.queries = 0

    def __call__(self, images: Images) -> Tensor:
        """Labels (n,) int64, or probabilities (n, K), for images (n, C, H, W). Raises UserError, and answers nothing, past the budget."""
        if self.queries + len(images) > self.budget:
            raise UserError(f"{self.queries} of {self.budget} queries are spent: {len(images)} more would go beyond the budget")
        self.queries += len(images)
        logits = loop.predict(self._net, images, device=self._device)
        return logits.argmax(1) if self.answers == "labels" else logits.softmax(1)


class Generator(nn.Module):
    """Noise (n, Z) to images (n, C, H, W) in [0, 1]. DisGUIDE's: two doublings, and a last normalisation that settles the range of pixels.

    `contrast` is how far the normalised values are spread before the sigmoid.
    """

    def __init__(self, shape: Sequence[int], noise: int, channels: int, contrast: float) -> None:
        super().__init__()
        out, height, width = shape
        self.first, self.size, self.contrast = (2 * channels, -(-height // 4), -(-width // 4)), (height, width), contrast
        self.spread = nn.Linear(noise, int(np.prod(self.first)))
        self.body = nn.Sequential(
            nn.BatchNorm2d(2 * channels), nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * channels, 2 * channels, 3, padding=1), nn.BatchNorm2d(2 * channels), nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.LeakyReLU(0.2),
            nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out, affine=False),
        )  # fmt: skip

    def forward(self, noise: Tensor) -> Tensor:
        drawn = self.body(self.spread(noise).unflatten(1, self.first))
        return torch.sigmoid(self.contrast * drawn[:, :, : self.size[0], : self.size[1]])


class Store:
    """The last `size` images and what the victim said of them, with how hard each is for the clones."""

    def __init__(self, size: int, shape: Sequence[int]) -> None:
        self.images = np.zeros((size, *shape), np.uint8)
        self.hardness = torch.ones(size)
        self.answers: Tensor | None = None
        self.added = 0

    def __len__(self) -> int:
        return min(self.added, len(self.images))

    def add(self, images: Images, answers: Tensor) -> Tensor:
        """Keep images (n, C, H, W) and answers (n,) or (n, K), over the oldest where it is full; as hard as can be until seen.

        Gives their positions (n,).
        """
        images, answers = images[-len(self.images) :], answers[-len(self.images) :]
        if self.answers is None:
            self.answers = answers.new_zeros((len(self.images), *answers.shape[1:]))
        at = torch.arange(self.added, self.added + len(images)) % len(self.images)
        self.images[at.numpy()], self.answers[at], self.hardness[at] = images, answers, 1.0
        self.added += len(images)
        return at

    def labels(self) -> npt.NDArray[np.int64]:
        """The label (n,) of each answer, the likeliest one of probabilities."""
        if self.answers is None:
            return np.zeros(0, np.int64)
        found = self.answers[: len(self)]
        return (found if found.dim() == 1 else found.argmax(1)).numpy()

    def draw(self, n: int, hard: float, generator: torch.Generator) -> Tensor:
        """Positions (n,) or all, without repetition, by weights 1 - hard + hard * hardness: 0 draws all rows alike."""
        weights = 1 - hard + hard * self.hardness[: len(self)]
        return torch.multinomial(weights + LEAST, min(n, len(self)), generator=generator)


class Clones:
    """Networks that learn the same answers from different first weights. Output i is the victim's label `labels[i]`."""

    def __init__(
        self,
        nets: Sequence[Net],
        labels: Sequence[int],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        steps: int,
        device: str = "cpu",
    ) -> None:
        self.nets, self.labels, self.device = [net.to(device) for net in nets], list(labels), device
        learning = [weights for net in nets for weights in net.parameters()]
        self.optimiser = torch.optim.SGD(learning, lr, momentum, weight_decay=weight_decay)
        self.schedule = loop.one_cycle(self.optimiser, lr, steps)

    def outputs(self, answers: Tensor) -> Tensor:
        """The outputs (n,) that stand for labels (n,); a label that is new gets one. Probabilities (n, K) are as they are."""
        if answers.dim() > 1:
            return answers
        new = [label for label in dict.fromkeys(answers.tolist()) if label not in self.labels]
        if new:
            self.labels += new
            for net in self.nets:
                grow(net, len(self.labels), self.optimiser)
        return torch.tensor([self.labels.index(label) for label in answers.tolist()])

    def mode(self, training: bool) -> None:
        """Put all into training mode, or out of it."""
        for net in self.nets:
            net.train(training)

    def logits(self, images: Tensor) -> Tensor:
        """Logits (M, n, K) of images (n, C, H, W) in [0, 1]."""
        return torch.stack([net(images) for net in self.nets])

    def learn(self, store: Store, at: Tensor) -> None:
        """One step on the rows of the store at these positions, which are told how hard they were: 1 - the answer's probability."""
        self.mode(training=True)
        answers = store.answers[at].to(self.device)  # type: ignore[index]
        logits = self.logits(loop.to_float(store.images[at.numpy()], self.device))
        value = torch.stack([answer_loss(one, answers) for one in logits]).sum()
        self.optimiser.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        self.schedule.step()
        said = answers if answers.dim() == 1 else answers.argmax(1)
        hardness = 1 - logits.detach().softmax(2).mean(0).gather(1, said[:, None])[:, 0].cpu()
        store.hardness[at] = hardness.nan_to_num(1.0)  # that training diverged is said at its end


class Generators:
    """An ensemble that makes images the clones disagree on, each its share of a batch. Without any the images are uniform noise."""

    def __init__(self, nets: Sequence[Generator], shape: Sequence[int], noise: int, lr: float, device: str = "cpu") -> None:
        self.nets, self.shape, self.noise, self.device = nn.ModuleList(nets).to(device), tuple(shape), noise, device
        self.optimiser = torch.optim.Adam(self.nets.parameters(), lr) if len(self.nets) else None

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Images (n, C, H, W) in [0, 1]. A generator makes two or more: its normalisation is that of a batch."""
        each = [max(len(part), 2) for part in np.array_split(np.arange(n), len(self.nets))]
        drawn = [net(torch.randn(k, self.noise, generator=generator).to(self.device)) for net, k in zip(self.nets, each, strict=True)]
        return torch.cat(drawn)[:n]

    @torch.no_grad()
    def images(self, n: int, generator: torch.Generator) -> Images:
        """Images (n, C, H, W) as a served model takes them, shuffled."""
        if not len(self.nets):
            return torch.randint(0, 256, (n, *self.shape), generator=generator, dtype=torch.uint8).numpy()
        drawn = (self.draw(n, generator) * 255).round().to(torch.uint8).cpu()
        return drawn[torch.randperm(n, generator=generator)].numpy()

    def learn(self, clones: Clones | None, n: int, balance: float, generator: torch.Generator) -> None:
        """One step on a batch of `n`, the clones as they are; none without clones."""
        if self.optimiser is None or clones is None:
            return
        clones.mode(training=False)
        value = generator_loss(clones.logits(self.draw(n, generator)), balance)
        self.optimiser.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()


def disagreement(probabilities: Tensor) -> Tensor:
    """Standard deviation over M clones of each class's probability, mean over classes (n,); probabilities (M, n, K). DisGUIDE."""
    return probabilities.std(0).mean(1)


def generator_loss(logits: Tensor, balance: float) -> Tensor:
    """- disagreement + balance * sum_k p_k log p_k, p the clones' and the batch's mean probabilities; logits (M, n, K).

    Low where the clones disagree, and where a batch holds all classes alike.
    """
    probabilities = logits.softmax(2)
    mean = probabilities.mean((0, 1))
    return balance * torch.xlogy(mean, mean.clamp_min(LEAST)).sum() - disagreement(probabilities).mean()


def answer_loss(logits: Tensor, answers: Tensor) -> Tensor:
    """Mean distance of one clone's logits (n, K) from answers: cross-entropy of labels (n,); of probabilities (n, K) the mean absolute
    difference of logits from their logarithms less each row's mean."""
    if answers.dim() == 1:
        return F.cross_entropy(logits, answers)
    logs = answers.clamp_min(LEAST).log()
    return F.l1_loss(logits, logs - logs.mean(1, keepdim=True))


def worth(scores: Tensor, guesses: Tensor, have: npt.NDArray[np.int64], n: int) -> npt.NDArray[np.int64]:
    """Positions of the `n` candidates to pay for: again and again the best-scored of the class that is fewest so far.

    scores (m,); guesses (m,) are classes as the clones see them; `have` (K,) counts the answers so far. Of equals the earlier one.
    """
    order = np.argsort(-scores.numpy(), kind="stable")
    waiting = [order[guesses.numpy()[order] == label].tolist()[::-1] for label in range(len(have))]
    counts = have.astype(np.float64)
    picked = []
    for _ in range(min(n, len(scores))):
        label = int(np.argmin(np.where([bool(rows) for rows in waiting], counts, np.inf)))
        picked.append(waiting[label].pop())
        counts[label] += 1
    return np.array(picked, np.int64)


def grow(net: Net, classes: int, optimiser: torch.optim.Optimizer | None = None) -> None:
    """Give the last layer outputs up to `classes`: what it and the optimiser hold of the old ones stays. Call it inside `loop.seeded`."""
    old = net.head
    net.head = nn.Linear(old.in_features, classes).to(old.weight.device)
    net.arch["classes"] = classes
    for was, now in ((old.weight, net.head.weight), (old.bias, net.head.bias)):
        now.data[: len(was)] = was.data
        if optimiser is None:
            continue
        for group in optimiser.param_groups:
            group["params"] = [now if weights is was else weights for weights in group["params"]]
        state = optimiser.state.pop(was, {})
        if state.get("momentum_buffer") is not None:
            buffer = torch.zeros_like(now)
            buffer[: len(was)] = state["momentum_buffer"]
            optimiser.state[now] = {"momentum_buffer": buffer}


def in_order(net: Net, labels: Sequence[int], classes: int) -> Net:
    """A copy whose output k is class k, of `classes`; output i of `net` is class labels[i], and classes that are not there never win."""
    made = copy.deepcopy(net)
    if list(labels) == list(range(classes)):
        return made
    made.head = nn.Linear(net.head.in_features, classes).to(net.head.weight.device)
    made.arch["classes"] = classes
    made.head.weight.data.zero_()
    made.head.bias.data.fill_(NEVER)
    made.head.weight.data[list(labels)] = net.head.weight.data
    made.head.bias.data[list(labels)] = net.head.bias.data
    return made


@torch.no_grad()
def joined(nets: Sequence[Net]) -> Net:
    """Several `ConvNet`s of one description, without normalisation, side by side in one: its logits are the mean of theirs.

    Call it inside `loop.seeded`.
    """
    first = nets[0].arch
    wider = {"widths": [len(nets) * width for width in first["widths"]], "hidden": len(nets) * first["hidden"]}
    made = networks.build({**first, **wider})
    for name, weight in made.state_dict().items():
        parts = [net.state_dict()[name] for net in nets]
        if name == "head.weight":
            weight.copy_(torch.cat(parts, 1) / len(nets))
        elif name == "head.bias":
            weight.copy_(torch.stack(parts).mean(0))
        elif weight.dim() < 2:  # biases of others one after another; mean and deviation of pixels are one for all
            weight.copy_(torch.cat(parts) if weight.dim() else parts[0])
        else:
            weight.zero_()
            shared = weight.shape[1] == parts[0].shape[1]  # the first layer of each looks at the same image
            for at, part in enumerate(parts):
                out, into = part.shape[:2]
                weight[at * out : (at + 1) * out, 0 if shared else at * into :][:, :into] = part
    return made


def entropy(counts: npt.NDArray[np.int64]) -> float:
    """Entropy in nats of labels that came so often (K,)."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum()) + 0.0
