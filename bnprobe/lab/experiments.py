"""The registry of experiments. A row imports no torch, so that the command line can list them at once."""

from __future__ import annotations

from dataclasses import dataclass

from bnprobe.registry import Registry


@dataclass(frozen=True)
class ExperimentRow:
    """An experiment.

    Attributes:
        name: As in ``bnprobe lab NAME``.
        title: What it is about, a phrase.
        question: What it asks, a sentence.
        sources: Papers that it follows; empty: a question that is open.
        code: Where its ``bnprobe.lab.experiment.Experiment`` is, as "package.module:CLASS".
        takes_data: Whether it trains on images, so that the user may give others.
        alone: Whether its trials run one after the other, since it takes times.
    """

    name: str
    title: str
    question: str
    sources: tuple[str, ...]
    code: str
    takes_data: bool = True
    alone: bool = False


IOFFE_2015 = "Ioffe & Szegedy 2015, Batch Normalization, arXiv 1502.03167"
IOFFE_2017 = "Ioffe 2017, Batch Renormalization, arXiv 1702.03275"
WU_HE = "Wu & He 2018, Group Normalization, arXiv 1803.08494"
SANTURKAR = "Santurkar et al. 2018, How Does Batch Normalization Help Optimization?, arXiv 1805.11604"
WU_JOHNSON = 'Wu & Johnson 2021, Rethinking "Batch" in BatchNorm, arXiv 2105.07576'
LI = "Li et al. 2019, Understanding the Disharmony between Dropout and Batch Normalization, arXiv 1801.05134"
SCHNEIDER = "Schneider et al. 2020, Improving robustness against common corruptions, arXiv 2006.16971"
GOODFELLOW = "Goodfellow et al. 2014, Generative Adversarial Networks, arXiv 1406.2661"
RADFORD = "Radford et al. 2016, Unsupervised Representation Learning with Deep Convolutional GANs, arXiv 1511.06434"
XIE = "Xie et al. 2020, Adversarial Examples Improve Image Recognition, arXiv 1911.09665"
GOYAL = "Goyal et al. 2017, Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour, arXiv 1706.02677"
JACOB = (
    "Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,"
    " arXiv 1712.05877"
)

EXPERIMENTS: Registry[ExperimentRow] = Registry(
    "bnprobe.experiments",
    (
        ExperimentRow(
            name="scratch",
            title="Batch norm from the equations",
            question="Is a layer written from the paper's equations torch's, and what does it change in training?",
            sources=(IOFFE_2015,),
            code="bnprobe.lab.scratch:Scratch",
        ),
        ExperimentRow(
            name="rates",
            title="How high a learning rate may be",
            question="How much higher may the learning rate be with batch norm, and why?",
            sources=(IOFFE_2015, SANTURKAR),
            code="bnprobe.lab.rates:Rates",
        ),
        ExperimentRow(
            name="small-batch",
            title="What a small batch does to its statistics",
            question="How far are statistics of B samples from the population's, and as far as formulas say?",
            sources=(IOFFE_2017,),
            code="bnprobe.lab.small_batch:SmallBatch",
        ),
        ExperimentRow(
            name="renorm",
            title="Batch Renorm on small batches and on ones sorted by class",
            question="Does Batch Renorm keep its accuracy where the images of a batch are few or alike?",
            sources=(IOFFE_2017, WU_HE),
            code="bnprobe.lab.renorm:Renorm",
        ),
        ExperimentRow(
            name="momentum",
            title="How far running statistics lag behind",
            question="Which momentum survives a shift at validation, and how long does each take to recover?",
            sources=(IOFFE_2015, SCHNEIDER),
            code="bnprobe.lab.momentum:Momentum",
        ),
        ExperimentRow(
            name="single",
            title="Batches of one image",
            question="Which normalization learns from single images, with at most 15% less accuracy than from 32?",
            sources=(),
            code="bnprobe.lab.single:Single",
        ),
        ExperimentRow(
            name="one-class",
            title="Batches of a single class",
            question="What do normalized activations still tell of the class when a batch holds only one?",
            sources=(),
            code="bnprobe.lab.one_class:OneClass",
        ),
        ExperimentRow(
            name="stream",
            title="Running statistics under drift",
            question="How far off are running statistics of data that drifts, and which momentum is best, untuned?",
            sources=(),
            code="bnprobe.lab.stream:DriftingStreams",
            takes_data=False,
        ),
        ExperimentRow(
            name="freeze",
            title="Workers with statistics of their own, and frozen ones",
            question="What do statistics of small parts of a batch cost, and when may statistics be frozen?",
            sources=(GOYAL, WU_JOHNSON),
            code="bnprobe.lab.freeze:Freeze",
        ),
        ExperimentRow(
            name="style",
            title="Between batch norm and instance norm",
            question="Which blend of an image's own statistics and those of all images holds where styles differ?",
            sources=(),
            code="bnprobe.lab.style:Style",
        ),
        ExperimentRow(
            name="dropout",
            title="Dropout before and behind batch norm",
            question="How far does dropout move the variance that batch norm keeps, what does it cost, what mends it?",
            sources=(LI,),
            code="bnprobe.lab.dropout:Dropout",
        ),
        ExperimentRow(
            name="gan",
            title="Real and generated images in one discriminator",
            question="What do real and generated images do to each other's running statistics, and what mends it?",
            sources=(GOODFELLOW, RADFORD, XIE, IOFFE_2017),
            code="bnprobe.lab.gan:Gan",
        ),
        ExperimentRow(
            name="medical",
            title="3-D volumes at batch 1 and 2",
            question="What do batches of one or two volumes cost batch norm, and what holds without large batches?",
            sources=(WU_HE, IOFFE_2017, GOYAL),
            code="bnprobe.lab.medical:Medical",
            takes_data=False,
        ),
        ExperimentRow(
            name="speed",
            title="What batch norm costs in a deployed network",
            question="Is batch norm folded into convolutions exact and faster, and is an image done within 9 ms?",
            sources=(JACOB,),
            code="bnprobe.lab.speed:Speed",
            alone=True,
        ),
    ),
    name_of=lambda row: row.name,
    noun="experiment",
)
"""In the order in which they are listed."""
