"""Image files with damage, drawn by a seeded die: to the EXIF data, the colour profile, the XMP packet or
the pixels."""
import io, random, struct, zlib
from typing import NamedTuple
from PIL import Image, ImageCms

KINDS = ('exif', 'icc', 'xmp', 'pixels')
FORMATS = ('JPEG', 'PNG', 'WEBP')

class Damaged(NamedTuple):
    "A damaged image file."
    name: str # Such as '17 exif PNG'
    kind: str # What is damaged: one of `KINDS`
    data: bytes # The file
    whole: bytes # The same file without the damage

def short(value): return struct.pack('<HH', value, 0)

def tiff(entries):
    "EXIF data from entries (tag, type, count, four bytes)."
    packed = b''.join(
        struct.pack('<HHI', tag, kind, count) + value for tag, kind, count, value in sorted(entries)
    )
    return b'II' + struct.pack('<HIH', 42, 8, len(entries)) + packed + struct.pack('<I', 0)

TURNED = (0x112, 3, 1, short(6)) # to be turned by 90 degrees
ENTRIES = [TURNED, (0x10f, 2, 4, b'mak\0'), (0x128, 3, 1, short(2)), (0x213, 3, 1, short(1))]
# of a type that the tag cannot have
ODD = [
    (tag, kind, 4 if kind in (1, 2, 7) else 1, value)
    for value in (b'abcd', b'abc\0', bytes([1, 2, 3, 4]))
    for tag in (0x100, 0x10F, 0x11A, 0x11B, 0x128, 0x132, 0x213, 0x8769, 0x8825, 0xA005, 0x927C)
    for kind in (1, 2, 4, 5, 7, 12, 99)
]
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
XMP = (
    b'<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF'
    b' xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description'
    b' xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Make="maker"/></rdf:RDF></x:xmpmeta><?xpacket'
    b' end="w"?>'
)

def scene(dice, size=(48, 32)):
    "An image whose corners differ, so that it tells how it was turned."
    draw = lambda: tuple(dice.randrange(256) for _ in range(3))
    corners = Image.new('RGB', (2, 2))
    corners.putdata([draw() for _ in range(4)])
    return corners.resize(size, Image.Resampling.BICUBIC)

def saved(image, kind, **more):
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()

def jpeg(image, exif, icc, xmp, wrong_sum=None):
    segment = lambda marker, data: bytes([0xff, marker]) + struct.pack('>H', len(data)+2) + data
    plain = saved(image, 'JPEG', quality=95)
    return (
        plain[:2]
        + segment(0xE1, b'Exif\0\0' + exif)
        + segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0' + xmp)
        + segment(0xE2, b'ICC_PROFILE\0\1\1' + icc)
        + plain[2:]
    )

def png(image, exif, icc, xmp, wrong_sum=None):
    names = dict(exif=b'eXIf', icc=b'iCCP', xmp=b'iTXt')
    def chunk(name, data):
        return (
            struct.pack('>I', len(data))
            + name
            + data
            + struct.pack('>I', zlib.crc32(name + data) ^ (name == names.get(wrong_sum)))
        )
    plain = saved(image, 'PNG')
    head = 8+25 # signature and IHDR
    return (plain[:head] + chunk(b'iCCP', b'profile\0\0' + zlib.compress(icc)) +
            chunk(b'iTXt', b'XML:com.adobe.xmp\0\0\0\0\0' + xmp) + chunk(b'eXIf', exif) + plain[head:])

def webp(image, exif, icc, xmp, wrong_sum=None):
    def chunk(name, data):
        return name + struct.pack('<I', len(data)) + data + b'\0'*(len(data)%2)
    size = struct.pack('<I', image.width-1)[:3] + struct.pack('<I', image.height-1)[:3]
    body = (
        chunk(b'VP8X', bytes([0b101100, 0, 0, 0]) + size)
        + chunk(b'ICCP', icc)
        + saved(image, 'WEBP', quality=95)[12:]
        + chunk(b'EXIF', exif)
        + chunk(b'XMP ', xmp)
    )
    return b'RIFF' + struct.pack('<I', len(body)+4) + b'WEBP' + body

MAKE = dict(JPEG=jpeg, PNG=png, WEBP=webp)

def scratched(dice, data):
    "Some bytes changed, the end missing, all of it replaced, or nothing left."
    data, how = bytearray(data), dice.randrange(8)
    if how == 0: return bytes(data[:dice.randrange(len(data))])
    if how == 1: return dice.randbytes(dice.randrange(1, 200))
    if how == 2: return b''
    for _ in range(dice.choice([1, 3, 30])):
        data[dice.randrange(dice.choice([min(32, len(data)), len(data)]))] = dice.randrange(256)
    return bytes(data)

def spoiled_exif(dice):
    "EXIF data with entries of a type that they cannot have, or scratched."
    if dice.random() < .6:
        return tiff([TURNED] + [e for e in dice.sample(ODD, dice.choice([1, 2]))])
    return scratched(dice, tiff(ENTRIES))

def damaged(n, seed=0):
    """Yield `n` damaged files, as `Damaged`: every kind of damage in every format.

    Only `pixels` touches more than metadata.
    """
    for i in range(n):
        dice = random.Random(f'{seed}/{i}')
        kind, form = KINDS[i%len(KINDS)], FORMATS[i//len(KINDS)%len(FORMATS)]
        image, good = scene(dice), dict(exif=tiff(ENTRIES), icc=PROFILE, xmp=XMP)
        whole = MAKE[form](image, **good)
        if kind == 'pixels':
            at = whole.rindex(dict(JPEG=b'\xff\xda', PNG=b'IDAT', WEBP=b'VP8 ')[form])
            data = whole[:at] + scratched(dice, whole[at:])
        else:
            bad = spoiled_exif(dice) if kind == 'exif' else scratched(dice, good[kind])
            data = MAKE[form](image, **{**good, kind: bad}, wrong_sum=kind if dice.random() < .25 else None)
        yield Damaged(f'{i} {kind} {form}', kind, data, whole)
