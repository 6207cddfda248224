"""Use LTKD in your own training loop: the loss needs the logits of student and teacher, and the class groups.

Run it with: python examples/loss_in_your_loop.py
"""

import torch
import torch.nn.functional as F
from torch import nn

from ltkd import GroupIndex, groups_by_share, ltkd_loss

train_counts = [500, 200, 80, 30, 12, 5]  # images of every class, in label order
groups = GroupIndex(groups_by_share(train_counts))
teacher, student = nn.Linear(16, 6).eval(), nn.Linear(16, 6)
optimizer = torch.optim.SGD(student.parameters(), lr=0.1)

for step in range(100):
    images = torch.randn(64, 16)  # your data loader
    labels = images[:, :6].argmax(1)
    with torch.no_grad():
        teacher_logits = teacher(images)
    student_logits = student(images)
    loss = F.cross_entropy(student_logits, labels) + ltkd_loss(student_logits, teacher_logits, groups)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step:3d}  loss {loss.item():.3f}")
