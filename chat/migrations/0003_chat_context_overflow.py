from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('chat', '0002_initial'),
    ]

    operations = [
        migrations.AddField(
            model_name='chat',
            name='context_overflow',
            field=models.CharField(default='truncateMiddle', help_text='workers.schemas.OverflowPolicy', max_length=32),
        ),
    ]
