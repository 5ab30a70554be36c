"""Rows for `random_training.PIECES` of what Python does besides: own backwards, state, hooks, modes, entries."""

BESIDE = """ ;; \
vstfi |  | x = Gated.apply(x, x.detach()) ;; vstfi |  | x = Setup.apply(x, 0.5) ;; vstfi |  | x = Asking.apply(x) ;; \
vstfi |  | x, k = Ranked.apply(x); x = x + 0.1 * k ;; vstfi |  | x = Half.apply(x)[0] + x ;; vstfi |  | x = \
Leveled.apply(x) ;; vstf | $p = PAR(C)) | x = Scaled.apply(x, $p) ;; vstf | $l = nn.Linear(C, C); \
$l.requires_grad_(False) | x = Scaled.apply(x, $l.bias) ;; vstf | $l = nn.Linear(C, C) | x = Product.apply(x, \
$l.weight) ;; vstfi | self.factor{i} = 1.5 | x = x * self.factor{i} ;; vstfi | $n = {'a': [0.5, 1.5]} | x = x * \
$n['a'][1] ;; vstf | $r = torch.linspace(0.5, 1.5, C) | x = x * $r ;; vstfi | $h = lambda x: x * 0.9 | x = $h(x) ;; \
vstfi | $s = None | $s = x.detach(); x = x + $s ;; vstf | LIN; $l.register_forward_pre_hook(lambda m, a: (a[0] * \
0.5,)) | x = $l(x) ;; vstf | LIN | with torch.autocast('cpu', enabled=False): x = $l(x) ;; vstf | LIN | with \
torch.set_grad_enabled(self.training): x = $l(x) ;; vstf | LIN | with torch.device('cpu'): x = $l(x) ;; vstf | LIN; \
torch.nn.utils.prune.l1_unstructured($l, 'weight', 4) | x = $l(x) ;; vstf | LIN | $l.zero_grad(); x = $l(x) ;; vstf | \
LIN | $l.train(not self.training); x = $l(x) ;; vstfi |  | x = x * 2 if flag else x ;; vstfi |  | x = x if mode == \
'a' else -x ;; vstf |  | x = x + deep['p'][1]['q'][1] ;; vs |  | x = x * half.view(len(half), *[1] * (x.dim() - 2), \
C) ;; vstf |  | x = x * (1 if len(deep['p']) == 2 else 3) + deep['r'].k ;; vstfi |  | x = x * (2 if \
wish.requires_grad else 3) ;; vstfi |  | x = x * (2 if isinstance(deep['p'], tuple) else 3) ;; vstf | $d = \
nn.ModuleDict({'a': nn.Linear(C, C)}) | x = x + ($d['a'] if 'a' in $d else None)(x) ;; vstf | \
self.add_module('late{i}', nn.Linear(C, C)); self.register_parameter('none{i}', None) | x = x + (self.late{i}(x) if \
self.none{i} is None else 0) ;; vstf |  | x = torch.repeat_interleave(x, torch.tensor([2, 0, 1, 1]), -1) ;; vstf |  | \
x = torch.cat([x[..., torch.arange(C) % 2 == 0], x[..., [False, True, False, True]]], -1) ;; vstf |  | x = x * 1; \
x[..., torch.arange(C) > 1] += 0.5 ;; vstf |  | x = x[..., torch.unique(torch.tensor([0, 1, 1, 2, 3]))] ;; vstf |  | \
x = x * torch.bincount(torch.tensor([0, 1, 1, 3])) ;; vstf |  | x = x + x[..., (torch.arange(C) > 2).nonzero()[:, 0]]
"""
# drawn seldom, as they are refused
ODD = """ ;; \
vstfi |  | x = Dirty.apply(x.clone()) ;; vstfi |  | x = Outer.apply(x) ;; vstfi |  | x = Counted.apply(x) ;; vstfi |  \
| x = Drawn.apply(x) ;; vstfi | $n = 0 | $n += 1; x = x * (1 + 0.1 * $n) ;; vstfi | $n = [] | $n.append(1); x = x + \
0.1 * len($n) ;; vstfi |  | x.register_hook(lambda g: g * 0.5) if x.requires_grad else None; x = x * 2 ;; vstf | LIN; \
$l.weight.register_hook(lambda g: g * 0.5) | x = $l(x) ;; vstf | LIN; $l.weight.register_hook(lambda g: \
g.clamp(-0.01, 0.01)) | x = $l(x) ;; vstf | LIN; $l.bias.register_post_accumulate_grad_hook(lambda p: \
(p.grad.mul_(0.5), None)[1]) | x = $l(x) ;; vstf | LIN; $l.register_full_backward_hook(lambda m, a, b: (a[0] * 0.5,)) \
| x = $l(x) ;; vstf | LIN | with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 1, lambda t: t * 1): x = \
$l(x) ;; vstf | LIN | x = x + torch.func.vjp(lambda y: $l(y).tanh(), x)[0] ;; vstf | LIN | x = x + \
torch.func.grad(lambda y: $l(y).tanh().sum())(x) ;; vstfi |  | x = x + torch.func.jvp(torch.sin, (x,), (x,))[1] ;; \
vstf | LIN | x = x + torch.autograd.grad($l(x).square().sum(), x, create_graph=True)[0] if x.requires_grad else x ;; \
vstf | LIN | x = $l(x); $l.bias.data.clamp_(-0.4, 0.4)
"""
# classes and functions that the rows name
FUNCTIONS = """import torch.nn.utils.prune
class Squash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): ctx.save_for_backward(x.tanh()); return x.tanh() * 2
    @staticmethod
    def backward(ctx, grad): return grad * 2 * (1 - ctx.saved_tensors[0] ** 2)
class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.round()
    @staticmethod
    def backward(ctx, grad): return grad
class Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate): ctx.save_for_backward(gate); return x * gate
    @staticmethod
    def backward(ctx, grad): return (grad * ctx.saved_tensors[0] if ctx.needs_input_grad[0] else None), None
class Setup(torch.autograd.Function):
    @staticmethod
    def forward(x, alpha): return x.sin() * alpha
    @staticmethod
    def setup_context(ctx, inputs, output): ctx.save_for_backward(inputs[0]); ctx.alpha = inputs[1]
    @staticmethod
    def backward(ctx, grad): return grad * ctx.saved_tensors[0].cos() * ctx.alpha, None
class Asking(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): ctx.shape = x.shape; return x.view_as(x)
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad): return grad * (2 if grad.shape == ctx.shape and type(grad) is torch.Tensor else 3)
class Ranked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        values, places = x.sort(-1)
        ctx.mark_non_differentiable(places)
        ctx.save_for_backward(places)
        return values, places
    @staticmethod
    def backward(ctx, grad, _): return torch.zeros_like(grad).scatter(-1, ctx.saved_tensors[0], grad)
class Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): ctx.set_materialize_grads(False); return x * 0.5, x * 3
    @staticmethod
    def backward(ctx, a, b): return (0 if a is None else a * 0.5) + (0 if b is None else b * 3)
class Dirty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): ctx.mark_dirty(x); return x.mul_(0.7)
    @staticmethod
    def backward(ctx, grad): return grad * 0.7
class Leveled(torch.autograd.Function):
    level = 1.5
    @staticmethod
    def forward(ctx, x): return x * Leveled.level
    @staticmethod
    def backward(ctx, grad): return grad * -Leveled.level
class Outer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): ctx.save_for_backward(x); return Straight.apply(x * 3) / 3
    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad(): y = (x * 3).tanh()
        return torch.autograd.grad(y, x, grad)[0]
class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p): ctx.save_for_backward(x, p); return x * p
    @staticmethod
    def backward(ctx, grad):
        x, p = ctx.saved_tensors
        return grad * p, (grad * x).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w): ctx.save_for_backward(x, w); return F.linear(x, w)
    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w, grad.flatten(0, -2).T @ x.flatten(0, -2) * 0.5
class Counted(torch.autograd.Function):
    seen = []
    @staticmethod
    def forward(ctx, x): return x * 1
    @staticmethod
    def backward(ctx, grad): Counted.seen.append(1); return grad * len(Counted.seen)
class Drawn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x * 1
    @staticmethod
    def backward(ctx, grad): return grad * torch.rand_like(grad)
"""
