"""The papers' figures, drawn with matplotlib (extra `plots`) from plain data.

Each function takes, for each network's name, what `robustkern.analysis.plain` makes of its results,
or the same read back from JSON, and returns a `matplotlib.figure.Figure` to save or to change. None
of them touches pyplot. Networks differ in line style and marker as well as in colour (Okabe and
Ito's, which colour-blind readers tell apart); surfaces and images use cividis and PuOr. What is not
finite is not drawn, and counted where it matters.

Example:
    >>> from robustkern.analysis import bounds_against_curvature, figures, plain
    >>> curvatures = [0.0, 1.0, 2.0]
    >>> figure = figures.bound_curves(plain(bounds_against_curvature(curvatures)), curvatures)
    >>> figure.axes[0].get_title()
    'local quadratic estimate, not a certificate'
"""

from robustkern.analysis.figures.bounds import bound_curves, loss_parabolas, network_bounds
from robustkern.analysis.figures.curvature import alignments, evolution, profile
from robustkern.analysis.figures.images import image_grid, saliency_maps
from robustkern.analysis.figures.normals import normal_spectra, shared_curvatures, subspace_laws
from robustkern.analysis.figures.planes import cross_sections, loss_surfaces, normal_sections

__all__ = [
    "alignments",
    "bound_curves",
    "cross_sections",
    "evolution",
    "image_grid",
    "loss_parabolas",
    "loss_surfaces",
    "network_bounds",
    "normal_sections",
    "normal_spectra",
    "profile",
    "saliency_maps",
    "shared_curvatures",
    "subspace_laws",
]
