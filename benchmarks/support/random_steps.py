"""Rows of `random_training` on what steps: optimizers, their groups and schedulers, what happens between steps."""

OPTIMIZERS = """
torch.optim.SGD({}, lr=0.05) ;; torch.optim.SGD({}, lr=0.05, momentum=0.9, nesterov=True) ;; torch.optim.SGD({}, \
lr=0.05, momentum=0.9, dampening=0.1, weight_decay=0.01) ;; torch.optim.SGD({}, lr=0.01, maximize=True) ;; \
torch.optim.Adam({}, lr=0.01) ;; torch.optim.Adam({}, lr=0.01, amsgrad=True, weight_decay=0.1) ;; \
torch.optim.AdamW({}, lr=0.01, betas=(0.8, 0.95)) ;; torch.optim.AdamW({}, lr=0.01, weight_decay=0.2, foreach=False) \
;; torch.optim.Adagrad({}, lr=0.05, lr_decay=0.1) ;; torch.optim.RMSprop({}, lr=0.01, centered=True, momentum=0.5) ;; \
torch.optim.Rprop({}, lr=0.01) ;; torch.optim.Adadelta({}, lr=1.0) ;; torch.optim.NAdam({}, lr=0.01) ;; \
torch.optim.RAdam({}, lr=0.01) ;; torch.optim.Adamax({}, lr=0.01) ;; torch.optim.ASGD({}, lr=0.01) ;; OwnAdam({}, \
lr=0.01) ;; OwnStep({}, lr=0.05) ;; torch.optim.Adafactor({}, lr=0.01) ;; Lamb({}, lr=0.02) ;; Lion({}, lr=0.01) ;; \
Slow({}, lr=0.05) ;; Lamb({}, lr=0.05, late=1) ;; Assigning({}, lr=0.05) ;; Central({}, lr=0.05) ;; \
torch.optim.AdamW({}, lr=torch.tensor(0.01)) ;; torch.optim.Adam({}, lr=0.01, fused=True) ;; torch.optim.SGD({}, \
lr=0.05, momentum=0.9, foreach=True)
"""
GROUPS = """
m.parameters() ;; m.parameters() ;; m.parameters() ;; [p for p in m.parameters() if p.requires_grad] ;; \
m.named_parameters() ;; [dict(params=[p for p in m.parameters() if p.dim() > 1]), dict(params=[p for p in \
m.parameters() if p.dim() <= 1], lr=0.02)] ;; [dict(params=[p]) for p in m.parameters()] ;; list(m.parameters())[:-1] \
or list(m.parameters()) ;; list(m.parameters())[::-1] ;; iter(m.parameters())
"""
# drawn seldom, as no plan can step so
ODD_OPTIMIZERS = """
ByCount({}, lr=0.02) ;; ByGroup({}, lr=0.05) ;; Kept({}, lr=0.05) ;; Dense({}, lr=0.05, weight_decay=0.1) ;; \
Noisy({}, lr=0.05)
"""
ODD_GROUPS = """
[*m.parameters(), *list(m.parameters())[:1]] ;; [*m.parameters(), *(b for b in m.buffers() if b.is_floating_point())]
"""
SCHEDULES = """
torch.optim.lr_scheduler.StepLR(o, 1, 0.5) ;; torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (k + 1)) ;; \
torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=8) ;; torch.optim.lr_scheduler.CosineAnnealingLR(o, 3) ;; \
torch.optim.lr_scheduler.SequentialLR(o, [torch.optim.lr_scheduler.ConstantLR(o, 0.1, 1), \
torch.optim.lr_scheduler.ExponentialLR(o, 0.5)], [1]) ;; torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, 2)
"""
HOOKS = """
[g.update(lr=g['lr'] * 0.5) for g in o.param_groups] ;; [g.update(weight_decay=0.3) for g in o.param_groups] ;; \
next(m.parameters()).requires_grad_(False) ;; [p.requires_grad_(k != 1) for p in list(m.parameters())[:2]] ;; sync(); \
next(m.parameters()).data.mul_(0.9) ;; sync(); [b.zero_() for b in m.buffers()] ;; m.eval() ;; sync() ;; sync(); \
torch.nn.init.ones_(list(m.parameters())[-1]) ;; evaluate() ;; o.state.clear() ;; sync(); \
o.load_state_dict(o.state_dict()) ;; sync(); m.load_state_dict({n: v * 0.9 if v.is_floating_point() else v for n, v \
in m.state_dict().items()}) ;; sync(); [s.mul_(0.5) for own in o.state.values() for n, s in own.items() if \
torch.is_tensor(s) and s.dim()] ;; [g.update(lr=-g['lr']) for g in o.param_groups[:1]] ;; m.train(k % 2 == 0) ;; \
sync(); [p.data.clamp_(-0.4, 0.4) for p in m.parameters()] ;; Leveled.level = 0.5 ;; [setattr(m, n, 0.5) for n in \
list(vars(m)) if n.startswith('factor')] ;; list(m.parameters())[-1].register_hook(lambda g: g * 0.5) ;; \
m.register_forward_hook(lambda m, a, out: None) ;; o.register_step_pre_hook(lambda *_: [g.update(lr=0.02) for g in \
o.param_groups] and None) ;; o.register_step_post_hook(lambda *_: [p.data.mul_(0.9) for g in o.param_groups for p in \
g['params']]) ;; m.zero_grad() ;; [c.eval() for c in list(m.children())[:1]] ;; setattr(m, 'extra', nn.Linear(C, C)) \
;; sync(); m.extra = nn.Linear(C, C).double() ;; sync(); \
o.add_param_group(dict(params=[nn.Parameter(torch.ones(2))])) ;; sync(); o.state.clear() ;; sync(); \
o.load_state_dict(dict(o.state_dict(), state={})) ;; o.param_groups[0]['params'].pop() ;; o.param_groups.reverse() ;; \
sync(); [setattr(p, 'data', p.data * 0.9) for p in m.parameters()] ;; sync(); [setattr(c, n, nn.Parameter(p.data * \
2)) for c in list(m.children())[:1] for n, p in list(c.named_parameters(recurse=False))] ;; sync(); \
m.register_buffer('later', torch.ones(2)) ;; [p.data.mul_(0.9) for p in m.parameters()] ;; m.extra = 1 ;; \
o.defaults.update(lr=0.3) ;; [c.register_forward_pre_hook(lambda c, a: (a[0] * 0.5, *a[1:])) for c in \
list(m.children())[:1]] ;; list(m.children())[-1].requires_grad_(k % 2 == 0)
"""
# classes of optimizers that the rows name
OWN = """class OwnAdam(torch.optim.AdamW):
    def __init__(self, params, **kw): super().__init__(params, **kw)
class OwnStep(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1, decay=0.0): super().__init__(params, dict(lr=lr, decay=decay))
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    seen = self.state[p].setdefault("seen", torch.zeros_like(p))
                    seen.mul_(0.9).add_(p.grad)
                    p.mul_(1 - group["decay"] * group["lr"]).add_(seen / (1 + seen.norm()), alpha=-group["lr"])
class Lamb(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1, late=0): super().__init__(params, dict(lr=lr, late=late))
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None: continue
                own = self.state[p]
                own["t"] = own.get("t", 0) + 1
                m = own.setdefault("m", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                v = own.setdefault("v", torch.zeros_like(p)).lerp_(p.grad ** 2, 0.01)
                u = m / (v / (1 - 0.99 ** own["t"])).add(1e-6).sqrt() + 0.01 * p
                p.sub_(u * (p.norm() / (u.norm() + 1e-3) if own["t"] > group["late"] else 1.0), alpha=group["lr"])
class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1): super().__init__(params, dict(lr=lr))
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in [p for p in group["params"] if p.grad is not None]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.sub_((0.9 * m + 0.1 * p.grad).tanh(), alpha=group["lr"])
                m.lerp_(p.grad, 0.01)
class ByCount(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups: group["weight_decay"] = 0.01 * (len(group["params"]) > 3)
        return super().step(closure)
class Slow(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                own = self.state[p]
                if p.grad is not None:
                    own["k"] = own.get("k", 0) + 1
                    own.setdefault("slow", p.clone())
                    if own["k"] % 2 == 0: own["slow"].lerp_(p, 0.5); p.copy_(own["slow"])
class Assigning(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None: p.data = p.data - group["lr"] * p.grad
class Central(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.dim() > 1: p.grad.sub_(p.grad.mean(tuple(range(1, p.dim())), keepdim=True))
        super().step(closure)
class ByGroup(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None]
            for p in held: p.sub_(p.grad / (1 + sum(q.grad.norm() for q in held)), alpha=group["lr"])
class Kept(torch.optim.SGD):
    def __init__(self, params, lr=0.1): super().__init__(params, lr=lr); self.count = 0
    def step(self, closure=None):
        self.count += 1
        for group in self.param_groups: group["weight_decay"] = 0.1 * self.count
        super().step(closure)
class Dense(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                grad = torch.zeros_like(p) if p.grad is None else p.grad
                p.sub_(grad + group["weight_decay"] * p, alpha=group["lr"])
class Noisy(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]: p.add_(torch.randn_like(p), alpha=0.01)
"""
