"""PSNR and SSIM against plain float64 formulas."""

import numpy as np
import pytest

from ringjax.training.image_tokenizer.quality import psnr, ssim


def plain_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004 as written there: every 11 × 11 window of every channel, weighted by a Gaussian of σ 1.5."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for channel in range(a.shape[-1]):
        x, y = a[..., channel].astype(np.float64), b[..., channel].astype(np.float64)
        for top in range(x.shape[0] - 10):
            for left in range(x.shape[1] - 10):
                p, q = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                top_ = (2 * mp * mq + c1) * (2 * cov + c2)
                values.append(top_ / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(values))


def pictures(noise: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    smooth = np.cumsum(rng.normal(size=(3, 20, 17, 3)), axis=1).cumsum(axis=2) * 8 + 128
    a = np.clip(smooth, 0, 255).astype(np.uint8)
    a[2] = 255  # white, where a variance is the difference of two large numbers
    b = np.clip(a + rng.normal(size=a.shape) * noise, 0, 255).astype(np.uint8)
    return a, b


@pytest.mark.parametrize("noise", [0.0, 2.0, 40.0])
def test_ssim_is_the_plain_formula(noise):
    a, b = pictures(noise)
    expected = [plain_ssim(x, y) for x, y in zip(a, b)]
    np.testing.assert_allclose(ssim(a, b), expected, rtol=0, atol=2e-5)  # float32
    assert noise or np.allclose(expected, 1)


def test_psnr_is_the_plain_formula():
    a, b = pictures(10.0)
    errors = ((a.astype(np.float64) - b.astype(np.float64)) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(psnr(a, b), 10 * np.log10(255**2 / errors), rtol=1e-6)
    assert psnr(a, a).tolist() == [99.0] * 3


def test_pictures_smaller_than_the_window_are_refused():
    small = np.zeros((1, 10, 12, 3), np.uint8)
    with pytest.raises(ValueError, match="10 × 12 are smaller than SSIM's window of 11"):
        ssim(small, small)
