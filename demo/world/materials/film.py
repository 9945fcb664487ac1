"""The holographic film: thin-film interference, computed per wavelength and integrated to colours."""

import functools
import math

import torch


def thin_film_reflectance(
    thickness_nm: torch.Tensor, cos_theta: torch.Tensor, wavelength_nm: torch.Tensor, n_film: float, n_base: float
) -> torch.Tensor:
    """Reflectance of a film on a base for unpolarised light, in 0..1; the arguments broadcast.

    Fresnel amplitudes at both interfaces, the Airy sum over the bounces inside the film (Born & Wolf, Principles of
    Optics, 7.6), the mean of both polarisations. cos_theta: cosine of the angle to the normal, in air. The indices are
    real: nothing is absorbed.
    """
    sin2 = 1 - cos_theta**2
    cos_film = (1 - sin2 / n_film**2).clamp_min(0).sqrt()
    cos_base = (1 - sin2 / n_base**2).clamp_min(0).sqrt()
    cos_phase = torch.cos(4 * math.pi * n_film * thickness_nm * cos_film / wavelength_nm)
    # Amplitudes at air-film and at film-base, of each polarisation
    s_top = _amplitude(cos_theta, n_film * cos_film)
    s_bottom = _amplitude(n_film * cos_film, n_base * cos_base)
    p_top = _amplitude(n_film * cos_theta, cos_film)
    p_bottom = _amplitude(n_base * cos_film, n_film * cos_base)
    total = 0
    for top, bottom in ((s_top, s_bottom), (p_top, p_bottom)):
        cross = 2 * top * bottom * cos_phase
        total = total + (top**2 + bottom**2 + cross) / (1 + (top * bottom) ** 2 + cross)
    return total / 2


def _amplitude(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a - b) / (a + b).clamp_min(1e-9)


def cie_xyz(wavelength_nm: torch.Tensor) -> torch.Tensor:
    """CIE 1931 colour-matching functions, [...] to [..., 3].

    The multi-lobe fit of Wyman, Sloan & Shirley, "Simple Analytic Approximations to the CIE XYZ
    Color Matching Functions", JCGT 2(2), 2013.
    """

    def lobe(centre, left, right):
        offset = wavelength_nm - centre
        return torch.exp(-0.5 * (offset * torch.where(offset < 0, left, right)) ** 2)

    x = 0.362 * lobe(442.0, 0.0624, 0.0374) + 1.056 * lobe(599.8, 0.0264, 0.0323) - 0.065 * lobe(501.1, 0.0490, 0.0382)
    y = 0.821 * lobe(568.8, 0.0213, 0.0247) + 0.286 * lobe(530.9, 0.0613, 0.0322)
    z = 1.217 * lobe(437.0, 0.0845, 0.0278) + 0.681 * lobe(459.0, 0.0385, 0.0725)
    return torch.stack([x, y, z], -1)


_FILM_INDEX, _BASE_INDEX = 1.9, 1.35
_FILM_NM = 1200.0  # the table's largest thickness
_FILM_GRID = (256, 64)  # thickness from 0 to _FILM_NM by cos_theta from 0 to 1


@functools.cache
def film_table(device: str = "cpu") -> torch.Tensor:
    """Linear sRGB reflectance of the film under white light, [256 thicknesses, 64 angles, 3], 0..1.

    The spectrum is summed in steps of 5 nm under an equal-energy light, balanced to white.
    """
    wavelengths = torch.arange(380.0, 781.0, 5.0, dtype=torch.float64)
    thickness = torch.linspace(0, _FILM_NM, _FILM_GRID[0], dtype=torch.float64)[:, None, None]
    cos_theta = torch.linspace(0, 1, _FILM_GRID[1], dtype=torch.float64)[None, :, None]
    spectrum = thin_film_reflectance(thickness, cos_theta, wavelengths, _FILM_INDEX, _BASE_INDEX)
    to_rgb = torch.tensor(
        [[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]], dtype=torch.float64
    )
    weights = cie_xyz(wavelengths) @ to_rgb.T
    rgb = spectrum @ (weights / weights.sum(0))
    return rgb.clamp(0, 1).float().to(device)


def film_colour(thickness_nm: torch.Tensor, cos_theta: torch.Tensor) -> torch.Tensor:
    """Bilinear look-up in film_table: two [R, T] tensors to [R, T, 3]."""
    table = film_table(str(thickness_nm.device)).reshape(-1, 3)
    rows, columns = _FILM_GRID
    u = (thickness_nm / _FILM_NM).clamp(0, 1) * (rows - 1)
    v = cos_theta.clamp(0, 1) * (columns - 1)
    i, j = u.floor().clamp(0, rows - 2), v.floor().clamp(0, columns - 2)
    a, b = (u - i)[..., None], (v - j)[..., None]
    k = (i * columns + j).long()
    low = table[k] * (1 - b) + table[k + 1] * b
    high = table[k + columns] * (1 - b) + table[k + columns + 1] * b
    return low * (1 - a) + high * a
