"""The training losses. A step's loss is the sum of its pictures' over the sum of their counts, however they are split.

So it does not depend on how pictures group: on ranks, on accumulation. Ours take the logits at the network's own stride
and never hold an upsampled batch: strips of rows are upsampled, turned into losses and gradients and forgotten, and
only the gradient at the network's stride is kept for backward.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from segtrain.config import IGNORE_INDEX, LossConfig, require
from segtrain.errors import UsageError

# Numbers in a strip of (rows, classes, columns): what fits a core's cache, and what keeps a GPU busy.
STRIP = {"cpu": 2**18, "cuda": 2**25}

Groups = Sequence[Sequence[int]]


class Loss:
    """Base of every loss. A step minimises the sum of loss(logits, target) / the sum of loss.count(target), over all
    pictures of the global batch: on all ranks and in all accumulation steps."""

    per_batch = False  # looks at the whole batch at once: several ranks or accumulation would change it
    marginal = False  # knows targets C + g, which say that the pixel is one of the classes groups[g]

    def count(self, target: Tensor) -> float:
        """What this batch adds to the divisor: here, its labelled pixels. A function of the target alone.

        target: uint8 or int64 (N, H, W), IGNORE_INDEX where there is no label.
        """
        return int((target != IGNORE_INDEX).sum())

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """(N,): each picture's sum, differentiable, in at least float32; 0 with gradient 0 for one without a label.

        logits: float (N, C, h, w), at any stride. target: int64 (N, H, W), IGNORE_INDEX where there is no label.
        """
        raise NotImplementedError

    def mean(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar, of a step that consists of this batch; 0 without any label."""
        return self(logits, target).sum() / (self.count(target) or 1)


def build_loss(config: LossConfig, num_classes: int, groups: Groups = ()) -> Loss:
    """The loss that the options name. groups: target C + g says that the pixel is one of the classes groups[g].

    UsageError for a name that LOSSES does not have, for options that its builder does not take, for class weights that
    are not one a class, and for groups where the loss cannot have them.
    """
    require(config.name in LOSSES, "loss.name", config.name, f"choose {', '.join(LOSSES)}")
    builder = LOSSES[config.name]
    try:
        inspect.signature(builder).bind(config, num_classes, groups, **config.options)
    except TypeError as error:
        known = list(inspect.signature(builder).parameters)[3:]
        text = f"loss.name={config.name} takes {', '.join(known) or 'none'} ({error})"
        raise UsageError(f"loss.options={config.options} is not possible: {text}") from error
    weights = config.class_weights
    require(
        weights is None or len(weights) == num_classes, "loss.class_weights", weights,
        f"give {num_classes} numbers, one for each class, or null",
    )  # fmt: skip
    loss = builder(config, num_classes, groups, **config.options)
    if groups:
        able = [name for name in ("cross_entropy", "bootstrapped", "max_pooling", "focal") if name in LOSSES]
        require(
            loss.marginal, "loss.name", config.name,
            f"this data has labels that leave open which of several classes a pixel is; choose {', '.join(able)}",
        )  # fmt: skip
        require(
            weights is None, "loss.class_weights", weights, "a label that leaves several classes open has no weight"
        )
        require(
            config.label_smoothing == 0, "loss.label_smoothing", config.label_smoothing,
            "it is not defined for labels that leave several classes open; give 0",
        )  # fmt: skip
    return loss


# ---------------------------------------------------------------------------------------------------- strip by strip


class StripLoss(Loss):
    """A loss of ours. Half-precision logits are reckoned in float32, and so is the loss. Not differentiable twice.

    The upsampling to the target's size is bilinear, corners not aligned.
    """

    groups: Groups = ()

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        if logits.dim() != 4 or target.dim() != 3 or logits.shape[0] != target.shape[0]:
            shapes = f"logits {tuple(logits.shape)} and target {tuple(target.shape)}"
            raise ValueError(f"{shapes} are not (N,C,h,w) and (N,H,W)")
        sums: Tensor = GradientInForward.apply(logits, target, self)
        return sums

    def sums(self, pictures: list["Strips"], wanted: bool) -> list[Tensor]:
        """The sum of each picture, a scalar. Its gradient, if wanted, is added to the picture.

        pictures: one, or all of the batch where the loss is per_batch.
        """
        raise NotImplementedError


class GradientInForward(torch.autograd.Function):
    """The gradient is taken while a strip is at hand, in forward: backward only multiplies."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, loss: StripLoss) -> Tensor:
        ctx.dtype = logits.dtype
        wanted = ctx.needs_input_grad[0]
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            gradient = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device) if wanted else None
            rows = bilinear(target.shape[1], logits)
            members = [torch.tensor(group, device=logits.device) for group in loss.groups]
            every = list(range(len(target)))
            sums: list[Tensor] = []
            for part in [every] if loss.per_batch else [[n] for n in every]:
                pictures = [Strips(logits[n], target[n], rows, members) for n in part]
                sums += loss.sums(pictures, wanted)
                for n in reversed(part):  # each forgotten before the next is enlarged
                    picture = pictures.pop()
                    if gradient is not None:
                        gradient[n] = picture.gradient()
                del picture
        ctx.save_for_backward(gradient)
        return torch.stack(sums)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors  # float32 for half types: a loss scale is applied before it is rounded
        return (gradient * factor[:, None, None, None]).to(ctx.dtype), None, None


class Strips:
    """One picture, enlarged strip by strip. Rows come first in memory: a strip is then one product of matrices."""

    def __init__(self, logits: Tensor, target: Tensor, rows: Tensor, groups: list[Tensor]) -> None:
        self.rows = rows  # (H, h)
        self.columns = bilinear(target.shape[1], logits)  # (W, w)
        self.classes = logits.shape[0]
        # In one layout whatever that of the logits, channels last as networks give them: a product's bits depend on it.
        wide = logits.permute(1, 2, 0).contiguous().transpose(1, 2)
        self.wide = wide @ self.columns.T  # (h, C, W)
        self.wide_gradient: Tensor | None = None
        self.valid = target != IGNORE_INDEX  # (H, W)
        plain = self.valid & (target < self.classes) if groups else self.valid
        self.index = target.where(plain, 0)[:, None]  # (H, 1, W)
        self.grouped = [(members, target == self.classes + g) for g, members in enumerate(groups)]

    def log_probabilities(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the target, and (rows, C, W) of theirs."""
        height, width = self.index.shape[0], self.index.shape[2]
        device = self.wide.device.type
        step = max(STRIP.get(device, STRIP["cpu"]) // (self.classes * width), 1)
        for first in range(0, height, step):
            r = slice(first, min(first + step, height))
            used = self.window(r)
            enlarged = self.rows[r, used] @ self.wide[used].flatten(1)
            yield r, enlarged.view(-1, self.classes, width).log_softmax(1)

    def window(self, r: slice) -> slice:
        """Those rows of the logits from which rows r of the target are interpolated, and perhaps one more."""
        height, own = self.rows.shape
        first, last = (math.floor((row + 0.5) * own / height - 0.5) for row in (r.start, r.stop - 1))
        return slice(min(max(first, 0), own - 1), min(last + 2, own))

    def add(self, gradient: Tensor, r: slice) -> None:
        """gradient: (rows, C, W), in the enlarged logits of rows r."""
        if self.wide_gradient is None:
            self.wide_gradient = torch.zeros_like(self.wide)
        used = self.window(r)
        self.wide_gradient[used].flatten(1).addmm_(self.rows[r, used].T, gradient.flatten(1))

    def gradient(self) -> Tensor:
        """(C, h, w), of all that was added."""
        assert self.wide_gradient is not None
        return (self.wide_gradient @ self.columns).permute(1, 0, 2)


def bilinear(size: int, like: Tensor) -> Tensor:
    """(size, own) weights that interpolate `own` values, the last or last but one dimension of `like`, to `size`.

    `own` is the height for a batch (N, C, h, w) and the width for a picture (C, h, w). Corners are not aligned.
    """
    own = like.shape[2]
    position = (torch.arange(size, dtype=torch.float64) + 0.5) * (own / size) - 0.5
    distance = position.clamp(0, own - 1)[:, None] - torch.arange(own)
    return (1 - distance.abs()).clamp(min=0).to(like)


def labelled(target: Tensor) -> list[int]:
    """The labelled pixels of each picture. target: (N, H, W)."""
    counts: list[int] = (target != IGNORE_INDEX).flatten(1).sum(1).tolist()
    return counts


# ---------------------------------------------------------------------------------------------------- pixel by pixel


class CrossEntropy(StripLoss):
    """-log p of each labelled pixel's class; their mean, or the mean weighted by class.

    class_weights, label_smoothing: as torch.nn.functional.cross_entropy has them; the divisor is the sum of the weights
    of the labelled pixels' classes. groups: a pixel that is one of several classes has the loss of the sum of their
    probabilities.
    """

    marginal = True

    def __init__(
        self, groups: Groups = (), class_weights: Sequence[float] | None = None, label_smoothing: float = 0.0
    ) -> None:
        self.groups = groups
        self.class_weights = class_weights
        self.label_smoothing = label_smoothing

    def count(self, target: Tensor) -> float:
        if self.class_weights is None:
            return super().count(target)
        weights = torch.tensor(self.class_weights, dtype=torch.float64)
        pixels = torch.bincount(target[target != IGNORE_INDEX].long(), minlength=len(weights))
        return float(pixels.cpu().double() @ weights)

    def sums(self, pictures: list[Strips], wanted: bool) -> list[Tensor]:
        result = []
        for picture in pictures:
            weight = picture.valid.to(picture.wide.dtype)
            parts = []
            for r, log_p in picture.log_probabilities():
                parts.append(self.pixels(picture, log_p, r).sum())
                if wanted:
                    picture.add(self.gradient(picture, log_p, weight[r], r), r)
            result.append(torch.stack(parts).sum())
        return result

    def pixels(self, picture: Strips, log_p: Tensor, r: slice) -> Tensor:
        """(rows, W): each pixel's loss, 0 for ignored ones."""
        found = cross_entropies(picture, log_p, r)
        if self.class_weights is not None or self.label_smoothing:
            weights, own = self.weights_of(picture, log_p, r)
            found = (1 - self.label_smoothing) * own * found
            if self.label_smoothing:
                found -= self.label_smoothing / picture.classes * torch.einsum("rcw,c->rw", log_p, weights)
        return found.masked_fill(~picture.valid[r], 0)

    def gradient(self, picture: Strips, log_p: Tensor, weight: Tensor, r: slice) -> Tensor:
        """(rows, C, W): that of the sum of the pixels' losses times weight (rows, W). log_p is overwritten."""
        index = picture.index[r]
        # Of a group's members, each takes its share of the group's probability.
        shares = [(members, here[r][:, None] * log_p[:, members].softmax(1)) for members, here in picture.grouped]
        hit = torch.ones_like(index, dtype=log_p.dtype)
        for _, here in picture.grouped:
            hit.masked_fill_(here[r][:, None], 0)
        p = log_p.exp_()
        if self.class_weights is not None or self.label_smoothing:
            weights, own = self.weights_of(picture, log_p, r)
            hit = (1 - self.label_smoothing) * own[:, None]
            spread = self.label_smoothing / picture.classes * weights
            p.mul_(hit + spread.sum()).sub_(spread[:, None])
        p.scatter_(1, index, p.gather(1, index) - hit)
        for members, share in shares:
            p[:, members] -= share
        return p.mul_(weight[:, None])

    def weights_of(self, picture: Strips, like: Tensor, r: slice) -> tuple[Tensor, Tensor]:
        """(C,) and (rows, W): the weights of the classes, and of each pixel's class."""
        weights = like.new_tensor(self.class_weights or [1.0] * picture.classes)
        return weights, weights[picture.index[r].squeeze(1)]


def cross_entropies(picture: Strips, log_p: Tensor, r: slice) -> Tensor:
    """(rows, W), 0 or more; wrong for ignored pixels."""
    found = -log_p.gather(1, picture.index[r]).squeeze(1)
    for members, here in picture.grouped:
        found = torch.where(here[r], -log_p[:, members].logsumexp(1).clamp(max=0), found)
    return found


class Focal(CrossEntropy):
    """-(1 - p) ** gamma log p of each labelled pixel's class; the mean over them, or weighted by class.

    Source: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, with softmax for the sigmoid. class_weights
    are its alpha, but the divisor is the sum of the labelled pixels' weights.
    """

    def __init__(self, gamma: float, groups: Groups = (), class_weights: Sequence[float] | None = None) -> None:
        super().__init__(groups, class_weights)
        self.gamma = gamma

    def pixels(self, picture: Strips, log_p: Tensor, r: slice) -> Tensor:
        missing = -torch.expm1(-cross_entropies(picture, log_p, r))  # 1 - p
        return super().pixels(picture, log_p, r) * missing**self.gamma

    def gradient(self, picture: Strips, log_p: Tensor, weight: Tensor, r: slice) -> Tensor:
        found = cross_entropies(picture, log_p, r)
        missing = -torch.expm1(-found)
        slope = torch.where(missing > 0, found / missing, 1)  # -log p / (1 - p)
        factor = missing**self.gamma * (1 + self.gamma * (1 - missing) * slope)  # d focal / d cross-entropy
        return super().gradient(picture, log_p, weight * factor, r)


class Weighing(CrossEntropy):
    """A pixel's weight depends on the picture's losses, so the picture is enlarged twice."""

    def sums(self, pictures: list[Strips], wanted: bool) -> list[Tensor]:
        every = [[self.pixels(picture, log_p, r) for r, log_p in picture.log_probabilities()] for picture in pictures]
        losses = torch.stack([torch.cat(strips) for strips in every])
        weights = self.weights(losses, torch.stack([picture.valid for picture in pictures]))
        if wanted:
            for picture, weight in zip(pictures, weights, strict=True):
                for r, log_p in picture.log_probabilities():
                    picture.add(self.gradient(picture, log_p, weight[r], r), r)
        return list((losses * weights).flatten(1).sum(1))

    def weights(self, losses: Tensor, valid: Tensor) -> Tensor:
        """losses (N, H, W), 0 for ignored pixels, and valid -> what each pixel counts, 0 for ignored ones."""
        raise NotImplementedError


class Bootstrapped(Weighing):
    """Cross-entropy of the hardest pixels only: the `hardest` share of each picture's, rounded up.

    normalisation "chosen": ignored pixels do not count towards the share; the sum over all chosen pixels is divided by
    their number. Source: In-Place ABN paper, section 4.2 (p = 1, m = 25 %). "seamseg": ignored pixels count towards
    the share, with loss 0; the mean over a picture's chosen pixels, then over all pictures. Source: SemanticSegLoss of
    mapillary/seamseg. per_batch: the share is that of the whole batch, not of each picture.
    """

    def __init__(
        self, hardest: float, normalisation: str = "chosen", per_batch: bool = False, groups: Groups = (),
        label_smoothing: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(groups, label_smoothing=label_smoothing)
        self.hardest = hardest
        self.normalisation = normalisation
        self.per_batch = per_batch

    def count(self, target: Tensor) -> float:
        if self.normalisation == "seamseg":
            return len(target)
        pictures = target.flatten()[None] if self.per_batch else target
        return sum(math.ceil(count * self.hardest) for count in labelled(pictures))

    def weights(self, losses: Tensor, valid: Tensor) -> Tensor:
        if self.normalisation == "seamseg":
            share = math.ceil(losses.numel() * self.hardest)
            return hardest_of(losses, share) * valid / share
        return hardest_of(losses.masked_fill(~valid, -1), math.ceil(int(valid.sum()) * self.hardest))


def hardest_of(losses: Tensor, count: int) -> Tensor:
    """1 for the `count` highest, else 0."""
    chosen = losses.flatten().topk(count, sorted=False).indices
    return torch.zeros_like(losses).flatten().index_fill_(0, chosen, 1).view_as(losses)


class MaxPooling(Weighing):
    """Loss max-pooling: each picture's highest weighted sum of pixel losses, over weights w >= 0 with ||w||_p <= gamma
    and ||w||_inf <= tau; the mean over the pictures that have labels.

    gamma = n ** (-1 / q), tau = gamma * m ** (-1 / p), 1 / p + 1 / q = 1, for n labelled pixels and m = hardest * n,
    rounded up: so at least m pixels count, p = 1 is the mean over the hardest m, and p = inf that over all. The
    gradient is that of the sum with the best weights held fixed (which is that of the maximum, by Danskin's theorem).
    Source: Rota Bulo, Neuhold, Kontschieder, Loss Max-Pooling for Semantic Image Segmentation, CVPR 2017, section 3;
    the weights are exact, by sorting.
    """

    def __init__(self, hardest: float, p: float, groups: Groups = (), label_smoothing: float = 0.0) -> None:
        super().__init__(groups, label_smoothing=label_smoothing)
        self.hardest = hardest
        self.p = p

    def count(self, target: Tensor) -> float:
        return sum(count > 0 for count in labelled(target))

    def weights(self, losses: Tensor, valid: Tensor) -> Tensor:
        n = int(valid.sum())
        m = math.ceil(n * self.hardest)
        if n == 0 or self.p == math.inf:
            return valid.to(losses.dtype) / max(n, 1)
        if self.p == 1:
            return hardest_of(losses.masked_fill(~valid, -1), m) / m
        order = losses.masked_fill(~valid, -1).flatten().argsort(descending=True, stable=True)[:n]
        best = highest_weights(losses.flatten()[order].double(), m, self.p).to(losses.dtype)
        return torch.zeros_like(losses).flatten().index_copy_(0, order, best).view_as(losses)


def highest_weights(losses: Tensor, m: int, p: float) -> Tensor:
    """The weights of MaxPooling for losses (n,), float64, in descending order, and 1 < p < inf.

    At the maximum the first k weights are tau and the others in proportion to loss ** (q - 1), scaled to the norm that
    is left. k is the least number for which none of those is above tau: (m - k) loss_k ** q <= the sum of loss ** q
    from k on. In logarithms: q is large where p is near 1.
    """
    n, q = len(losses), p / (p - 1)
    tau = n ** (-1 / q) * m ** (-1 / p)
    log = losses.log()
    rest = (q * log).flip(0).logcumsumexp(0).flip(0)  # of the sum from each pixel on
    left = torch.arange(m, 0, -1, dtype=losses.dtype, device=losses.device).log()  # log(m - k)
    above = left[:-1] + q * log[: m - 1] > rest[: m - 1]  # true, and from some k on false
    k = above.sum()
    share = ((left[k] - rest[k]) / p + (q - 1) * log).clamp(max=0).exp()
    share = torch.where(torch.arange(n, device=losses.device) < k, 1, share)
    return tau * share.nan_to_num(0)  # 0 / 0 where no loss is left: what it weighs is 0


# ---------------------------------------------------------------------------------------------------- class by class


class Dice(StripLoss):
    """1 - the mean of 2 sum(p g) / (sum(p) + sum(g)) over the classes that the picture's labels have.

    p: probability, g: 1 where the class is the label; sums over the picture's labelled pixels. The mean over the
    pictures that have labels. Source: the soft F1 of Milletari et al., V-Net, 2016, with sums, not sums of squares.
    """

    def count(self, target: Tensor) -> float:
        return sum(count > 0 for count in labelled(target))

    def sums(self, pictures: list[Strips], wanted: bool) -> list[Tensor]:
        return [self.picture(picture, wanted) for picture in pictures]

    def picture(self, picture: Strips, wanted: bool) -> Tensor:
        both, either, labels = torch.zeros(3, picture.classes, dtype=picture.wide.dtype, device=picture.wide.device)
        for r, log_p in picture.log_probabilities():
            p, here = log_p.exp_(), is_label(picture, r)
            both += p.where(here, 0).sum((0, 2))
            either += (p * picture.valid[r][:, None]).sum((0, 2))
            labels += here.sum((0, 2))
        either += labels
        present = (labels > 0).to(both.dtype)
        share = present / present.sum().clamp(min=1)
        if wanted:
            hit = 2 * share / either.clamp(min=1)  # of p where the class is the label
            everywhere = hit * both / either.clamp(min=1)
            for r, log_p in picture.log_probabilities():
                slope = everywhere[:, None] - hit[:, None] * is_label(picture, r)
                picture.add(through_softmax(log_p.exp_(), slope, picture.valid[r]), r)
        return (share * (1 - 2 * both / either.clamp(min=1))).sum()


class Lovasz(StripLoss):
    """Lovasz-Softmax: the Lovasz extension of each class's Jaccard loss (1 - IoU) at the errors |g - p|, the mean over
    the classes that the picture's labels have; the mean over the pictures that have labels.

    A picture's probabilities are held at full resolution, one picture at a time. Source: Berman, Rannen Triki,
    Blaschko, The Lovasz-Softmax loss, CVPR 2018 (per image, classes present).
    """

    def count(self, target: Tensor) -> float:
        return sum(count > 0 for count in labelled(target))

    def sums(self, pictures: list[Strips], wanted: bool) -> list[Tensor]:
        return [self.picture(picture, wanted) for picture in pictures]

    def picture(self, picture: Strips, wanted: bool) -> Tensor:
        present = picture.index.squeeze(1)[picture.valid].unique().tolist()
        p = torch.cat([log_p.exp_()[:, present] for _, log_p in picture.log_probabilities()])  # (H, present, W)
        sums = [torch.zeros((), dtype=p.dtype, device=p.device)]
        for k, c in enumerate(present):
            here = (picture.index.squeeze(1) == c) & picture.valid
            errors = (here.to(p.dtype) - p[:, k]).abs_().masked_fill_(~picture.valid, -1).flatten()
            ordered, order = errors.sort(descending=True, stable=True)
            slope = (jaccard_slopes(here.flatten()[order]) / len(present)).to(p.dtype)
            sums.append((ordered.clamp_(min=0) * slope).sum())
            slope = torch.empty_like(errors).index_copy_(0, order, slope).view_as(here)
            p[:, k] = torch.where(here, -slope, slope)  # in p's place
        if wanted:
            for r, log_p in picture.log_probabilities():
                slope = torch.zeros_like(log_p)
                slope[:, present] = p[r]
                picture.add(through_softmax(log_p.exp_(), slope, picture.valid[r]), r)
        return torch.stack(sums).sum()


def jaccard_slopes(here: Tensor) -> Tensor:
    """What each pixel, taken in this order, adds to the Jaccard loss once it and all before it are wrong.

    here: bool (n,), whether the class is its label. A wrong pixel of the class leaves the union and shrinks the
    intersection by 1; any other enlarges the union by 1. Written out, since differences of losses would cancel.
    """
    total = here.sum()
    missed = here.cumsum(0)
    inside = total - missed
    union = (total + torch.arange(1, len(here) + 1, device=here.device) - missed).double()
    return torch.where(here, 1 / union, inside / (union * (union - 1)))


def is_label(picture: Strips, r: slice) -> Tensor:
    """Bool (rows, C, W)."""
    classes = torch.arange(picture.classes, device=picture.index.device)
    return (picture.index[r] == classes[:, None]) & picture.valid[r][:, None]


def through_softmax(p: Tensor, slope: Tensor, valid: Tensor) -> Tensor:
    """The gradient in the logits from that in the probabilities, (rows, C, W) each, 0 for pixels that are not valid."""
    return (slope - (slope * p).sum(1, keepdim=True)).mul_(p).mul_(valid[:, None])


# ---------------------------------------------------------------------------------------------------- by name


def cross_entropy(config: LossConfig, num_classes: int, groups: Groups) -> Loss:
    return CrossEntropy(groups, config.class_weights, config.label_smoothing)


def bootstrapped(config: LossConfig, num_classes: int, groups: Groups) -> Loss:
    if config.hardest == 1 and config.normalisation == "chosen":
        return CrossEntropy(groups, None, config.label_smoothing)  # the same, and the picture is enlarged once
    per_batch = config.select == "batch"
    return Bootstrapped(config.hardest, config.normalisation, per_batch, groups, config.label_smoothing)


def max_pooling(config: LossConfig, num_classes: int, groups: Groups) -> Loss:
    return MaxPooling(config.hardest, config.p, groups, config.label_smoothing)


def focal(config: LossConfig, num_classes: int, groups: Groups) -> Loss:
    return Focal(config.gamma, groups, config.class_weights)


def dice(config: LossConfig, num_classes: int, groups: Groups) -> Loss:
    return Dice()


def lovasz(config: LossConfig, num_classes: int, groups: Groups) -> Loss:
    return Lovasz()


# Name -> builder(config, num_classes, groups, **loss.options). Plugins add to it.
LOSSES: dict[str, Callable[..., Loss]] = {
    "cross_entropy": cross_entropy,
    "bootstrapped": bootstrapped,
    "max_pooling": max_pooling,
    "focal": focal,
    "dice": dice,
    "lovasz": lovasz,
}
