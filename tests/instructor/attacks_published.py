"""Attacks after published ways out of sandboxes and graders, see `attacks`.

What students' code has done to nbgrader, Otter, JupyterHub and Gradescope's autograders: read the
process's environment and modules, patch what judges it, forge its protocol, climb from an object to
`os`, reach the kernel through memory of its own, leave a root folder, spoil what runs after it.
"""

# name: (code of the first exercise, what the reason says, its points)
PUBLISHED = {
    "a token of the hub": (
        """import os
def effective_batch(a, b, c):
    return [n for n in os.environ if 'TOKEN' in n or 'HOME' in n]""",
        "answered \\[\\]",
        0,
    ),
    "the grader's arguments": (
        """import sys
def effective_batch(a, b, c):
    return [sys.argv, sys.orig_argv, [p for p in sys.path if 'work' in p or 'instructor' in p]]""",
        "answered \\[\\['-c'\\], \\['python'\\], \\[\\]\\]",
        0,
    ),
    "modules of the grader": (
        """import sys
def effective_batch(a, b, c):
    return [m for m in sys.modules if 'marking' in m or 'assignments' in m or 'cases' in m]""",
        "answered \\[\\]",
        0,
    ),
    "imports the assignment": (
        """def effective_batch(a, b, c):
    from instructor.grade import marking
    return str(marking)""",
        "raised ModuleNotFoundError|raised PermissionError",
        0,
    ),
    "loader of a module": (
        """import importlib.util
def effective_batch(a, b, c):
    spec = importlib.util.spec_from_file_location('x', SECRET)
    m = importlib.util.module_from_spec(spec)
    return open(spec.origin).read()""",
        "raised",
        0,
    ),
    "object's subclasses": (
        """def effective_batch(a, b, c):
    for one in object.__subclasses__():
        if one.__name__ in ('_wrap_close', 'Popen'):
            found = one.__init__.__globals__
            return found.get('os', found.get('sys').modules['os']).system('touch ' + CANARY)
""",
        "answered 32512|answered -1|answered None|raised",
        0,
    ),
    "frames of the caller": (
        """import sys
def effective_batch(a, b, c):
    f = sys._getframe()
    seen = []
    while f:
        seen += [k for k in f.f_locals if k in ('expected', 'knows', 'secret', 'points', 'hidden')]
        f = f.f_back
    return seen""",
        "answered \\[\\]|does not allow",
        0,
    ),
    "ends the warden": (
        """import os, signal
def effective_batch(a, b, c):
    os.kill(os.getppid(), signal.SIGKILL)
    return a * b * c""",
        "raised",
        0,
    ),
    "ends its session": (
        """import os, signal
def effective_batch(a, b, c):
    os.killpg(0, signal.SIGKILL)
    return a * b * c""",
        "raised",
        0,
    ),
    "handle of a file": (
        """import ctypes
def effective_batch(a, b, c):
    libc = ctypes.CDLL(None, use_errno=True)
    return [libc.name_to_handle_at(-100, b'/', 0, 0, 0), libc.open_by_handle_at(3, 0, 0)]""",
        "answered \\[-1, -1\\]|raised",
        0,
    ),
    "a file of another process": (
        """import os
def effective_batch(a, b, c):
    return [os.readlink(f'/proc/{p}/cwd') for p in (PARENT, os.getppid(), 1)]""",
        "raised",
        0,
    ),
    "a file by its descriptor": (
        """import os
def effective_batch(a, b, c):
    return [os.read(n, 10).hex() for n in range(5, 64)]""",
        "raised",
        0,
    ),
    "out by dots": (
        """import os
def effective_batch(a, b, c):
    os.chdir('..')
    return open('../../../../..' + SECRET).read()""",
        "raised",
        0,
    ),
    "out by chroot": (
        """import os
def effective_batch(a, b, c):
    os.mkdir('x')
    os.chroot('x')
    return open('../../..' + SECRET).read()""",
        "raised",
        0,
    ),
    "mounts over": (
        """import ctypes
def effective_batch(a, b, c):
    libc = ctypes.CDLL(None, use_errno=True)
    return [
        libc.mount(b'none', b'/tmp', b'tmpfs', 0, 0),
        libc.umount2(b'/', 2),
        libc.unshare(0x10000000),
    ]""",
        "answered \\[-1, -1, -1\\]|raised",
        0,
    ),
    "a link in place of a folder": (
        """import os
def effective_batch(a, b, c):
    os.symlink('/', 'root')
    return os.listdir('root')""",
        "raised",
        0,
    ),
    "becomes root": (
        """import os
def effective_batch(a, b, c):
    os.setresuid(0, 0, 0)
    return a * b * c""",
        "raised",
        0,
    ),
    "a program in memory": (
        r"""import os
def effective_batch(a, b, c):
    fd = os.memfd_create('x')
    os.write(fd, b'#!/bin/sh\ntouch ' + CANARY.encode())
    os.execve(fd, ['x'], {})""",
        "raised",
        0,
    ),
    "a name in the abstract": (
        r"""import socket
def effective_batch(a, b, c):
    s = socket.socket(socket.AF_UNIX)
    s.bind('\0grader')
    return a * b * c""",
        "raised",
        0,
    ),
    "a raw socket": (
        """import socket
def effective_batch(a, b, c):
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).fileno()""",
        "raised",
        0,
    ),
    "a pair of sockets to flood": (
        """import socket
def effective_batch(a, b, c):
    return [socket.socketpair() for _ in range(10)] and 1""",
        "raised",
        0,
    ),
    "executable memory": (
        """import mmap
def effective_batch(a, b, c):
    m = mmap.mmap(-1, 4096, prot=7)
    import ctypes
    m.write(bytes([0xb8, 57, 0, 0, 0, 0x0f, 5, 0xc3]))
    f = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(m)))
    return f()""",
        "answered -1|raised",
        0,
    ),
    "executable memory, the old way": (
        """import mmap
def effective_batch(a, b, c):
    m = mmap.mmap(-1, 4096, prot=7)
    import ctypes
    m.write(bytes([0xb8, 2, 0, 0, 0, 0xcd, 0x80, 0xc3]))
    f = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(m)))
    return f()""",
        "crashed Python|raised",
        0,
    ),
    "bytecode of its own": (
        """import types
def effective_batch(a, b, c):
    code = effective_batch.__code__.replace(co_code=bytes([100, 250] * 40), co_consts=())
    return types.FunctionType(code, {})(1, 2, 3)""",
        "crashed|raised|not defined",
        0,
    ),
    "numbers in builtin exceptions": (
        """import builtins
def effective_batch(a, b, c):
    kinds = sorted(n for n in dir(builtins) if n.endswith('Error'))
    raise getattr(builtins, kinds[a % len(kinds)])(str([a, b, c]))""",
        "raised",
        0,
    ),
    "a class called ValueError": (
        """class ValueError(Exception): pass
ValueError.__module__ = 'builtins'
ValueError.__name__ = 'E7391'
def effective_batch(a, b, c):
    raise ValueError(a)""",
        "raised E7391",
        0,
    ),
    "group of exceptions": (
        """def effective_batch(a, b, c):
    e = ValueError('x')
    for _ in range(5000): e = ExceptionGroup('x', [e])
    raise e""",
        "raised ExceptionGroup|RecursionError|crashed",
        0,
    ),
    "notes on an exception": (
        """def effective_batch(a, b, c):
    e = ValueError('x')
    e.add_note('<script>' * 99)
    raise e""",
        "raised",
        0,
    ),
    "import hook": (
        """import sys
class Hook:
    def find_spec(self, name, *_): raise SystemExit(name)
sys.meta_path.insert(0, Hook())
def effective_batch(a, b, c):
    return a * b * c""",
        "right",
        3,
    ),
    "trace function": (
        """import sys
sys.settrace(lambda *a: (_ for _ in ()).throw(SystemExit))
def effective_batch(a, b, c):
    return a * b * c""",
        "right|raised|ended",
        None,
    ),
    "endless profile function": (
        """import sys
def p(*a):
    while True: pass
def effective_batch(a, b, c):
    sys.setprofile(p)
    return a * b * c""",
        "did not come back in time|raised",
        0,
    ),
    "deletes the builtins": (
        """import builtins
def effective_batch(a, b, c):
    for n in ('print', 'len', 'isinstance', 'hasattr', 'type', 'getattr'): delattr(builtins, n)
    return a * b * c""",
        "ended|raised|meddled",
        None,
    ),
    "answers by the next exercise": (
        """import builtins
real = builtins.callable
def effective_batch(a, b, c):
    builtins.callable = lambda f: False
    return a * b * c""",
        "not a function|right",
        None,
    ),
    "answers for those below": (
        """import sys
def effective_batch(a, b, c):
    main = sys.modules['__main__'].__dict__
    main['mean_loss'] = lambda *_: 0
    main['largest'] = lambda *_: 0
    return a * b * c""",
        "right",
        3,
    ),
    "stops time": (
        """import time
def effective_batch(a, b, c):
    time.process_time = time.monotonic = lambda: 0
    return a * b * c""",
        "right",
        3,
    ),
    "key that is a list": (
        """def effective_batch(a, b, c):
    return {(1, 2): 3}""",
        "raised",
        0,
    ),
    "answer that is a key of the grader's": (
        """def effective_batch(a, b, c):
    return {'nonce': 'x', 'value': a * b * c, 'ask': [1], 'source': []}""",
        "answered {'nonce'",
        0,
    ),
    "sends a source": (
        r"""import os
def effective_batch(a, b, c):
    os.write(3, b'{"source": [], "function": "x"}\n')
    return a * b * c""",
        "meddled|ended",
        0,
    ),
    "fills standard output of all": (
        """import os
def effective_batch(a, b, c):
    for fd in (1, 2):
        try:
            while True: os.write(fd, bytes(1 << 16))
        except OSError: pass
    return a * b * c""",
        "right|ended|raised",
        None,
    ),
    "sparse files": (
        """import os
def effective_batch(a, b, c):
    for n in range(600):
        with open(f'f{n}', 'wb') as f: f.truncate(1 << 20)
    return a * b * c""",
        "raised",
        None,
    ),
    "takes all inodes": (
        """import os
def effective_batch(a, b, c):
    for n in range(10 ** 6): os.mkdir(f'd{n}')
    return a * b * c""",
        "raised",
        0,
    ),
    "mmaps everything": (
        """import mmap
def effective_batch(a, b, c):
    return len([mmap.mmap(-1, 1 << 24) for _ in range(10 ** 4)])""",
        "raised|more memory",
        0,
    ),
    "endless regular expression": (
        """import re
def effective_batch(a, b, c):
    return re.match('(a+)+b', 'a' * 60)""",
        "did not come back in time",
        0,
    ),
    "integer of digits": (
        """import sys
def effective_batch(a, b, c):
    sys.set_int_max_str_digits(0)
    return 10 ** 20000""",
        "meddled|raised|far too long",
        0,
    ),
    "escape of the terminal": (
        r"""def effective_batch(a, b, c):
    return '\x1b]0;owned\x07\x1b[2J'""",
        "answered '\\\\x1b\\]0;owned",
        0,
    ),
    "right to left": (
        r"""def effective_batch(a, b, c):
    return 'abc\u202egpj.exe'""",
        "answered 'abc\\\\u202egpj",
        0,
    ),
    "a link in a message": (
        """def effective_batch(a, b, c):
    raise ValueError('`<img src=x onerror=alert(1)>` *javascript:x* [a](javascript:alert(1))')""",
        "raised",
        0,
    ),
    "template in a message": (
        """def effective_batch(a, b, c):
    raise ValueError('{{ 7 * 191 }} {% include "/etc/passwd" %} ${7*191}')""",
        "raised",
        0,
    ),
}
