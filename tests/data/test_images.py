import io

import numpy as np
import pytest
from PIL import Image

from dit_jax.data.images import DECODE_ERRORS, adm_center_crop, decode_image


def encode(image, fmt="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def noise(width, height, bands=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, bands), np.uint8)


@pytest.mark.parametrize("landscape", [True, False])
def test_adm_crop_step_by_step(landscape):
    image = Image.fromarray(noise(301, 200) if landscape else noise(200, 301))
    # The shorter side, 200 >= 2 * 64, is halved once; 64 / 100 of (150, 100) is (96, 64).
    if landscape:
        expected = image.resize((150, 100), Image.Resampling.BOX)
        expected = expected.resize((96, 64), Image.Resampling.BICUBIC).crop((16, 0, 80, 64))
    else:
        expected = image.resize((100, 150), Image.Resampling.BOX)
        expected = expected.resize((64, 96), Image.Resampling.BICUBIC).crop((0, 16, 64, 80))
    np.testing.assert_array_equal(np.asarray(adm_center_crop(image, 64)), np.asarray(expected))


def test_adm_crop_of_the_right_size_changes_nothing():
    image = Image.fromarray(noise(32, 32))
    np.testing.assert_array_equal(np.asarray(adm_center_crop(image, 32)), np.asarray(image))
    assert adm_center_crop(Image.fromarray(noise(10, 7)), 32).size == (32, 32)


def test_grey_and_colour_convert_into_each_other():
    grey = noise(5, 4, 1)
    data = encode(Image.fromarray(grey[..., 0]))
    np.testing.assert_array_equal(decode_image(data, channels=1), grey)
    np.testing.assert_array_equal(decode_image(data, channels=3), np.repeat(grey, 3, axis=-1))
    red = encode(Image.new("RGB", (2, 2), (255, 0, 0)))
    assert decode_image(red, channels=1)[0, 0, 0] == 76  # 0.299 * 255


def test_palettes_are_looked_up_and_transparency_lies_over_white():
    colours = noise(6, 6) // 64 * 64
    palette = Image.fromarray(colours).quantize(256)
    np.testing.assert_array_equal(
        decode_image(encode(palette), channels=3), np.asarray(palette.convert("RGB"))
    )
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = 0, 255, 51  # black: invisible, solid, one fifth
    decoded = decode_image(encode(Image.fromarray(pixels)), channels=3)
    assert decoded[0, :, 0].tolist() == [255, 0, 204]
    keyed = Image.new("P", (2, 1))
    keyed.putpalette([10, 20, 30, 40, 50, 60])
    keyed.putpixel((1, 0), 1)
    decoded = decode_image(encode(keyed, transparency=0), channels=3)
    assert decoded[0].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_sixteen_bit_grey_keeps_its_upper_bits():
    values = np.array([[0, 255, 256, 40_000, 65_535]], np.uint16)
    decoded = decode_image(encode(Image.fromarray(values)), channels=1)
    assert decoded[0, :, 0].tolist() == [0, 0, 1, 156, 255]


def test_cmyk_jpeg_and_lossless_webp():
    assert decode_image(encode(Image.new("CMYK", (3, 2)), "JPEG"), channels=3).min() > 250
    pixels = noise(4, 3)
    webp = encode(Image.fromarray(pixels), "WEBP", lossless=True)
    np.testing.assert_array_equal(decode_image(webp, channels=3), pixels)


def test_unreadable_files_and_decompression_bombs_are_refused(monkeypatch):
    data = encode(Image.fromarray(noise(64, 64)))
    for bad in (b"", b"not an image", data[:-200], encode(Image.new("L", (2, 2)), "GIF")):
        with pytest.raises(DECODE_ERRORS):
            decode_image(bad, channels=3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Image.DecompressionBombError):
        decode_image(data, channels=3)
